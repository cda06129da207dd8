"""Every operation of the MPI backend against single-process arithmetic, for all dtypes and unusual shapes."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.mpi import buffers
from tests.launch import run_function

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
OTHERS = [torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, *UNSIGNED]
SHAPES = [(), (0,), (3,), (5, 0, 2), (2, 3, 4), (300, 301)]  # the last is exchanged pairwise and is not divisible by 3
OPS = {
    "SUM": lambda x: x.sum(0),
    "AVG": lambda x: x.sum(0) / len(x) if x.is_floating_point() else x.sum(0).div(len(x), rounding_mode="trunc"),
    "MIN": lambda x: x.amin(0),
    "MAX": lambda x: x.amax(0),
    "PRODUCT": lambda x: x.prod(0),
    "BAND": lambda x: x[0] & x[1] & x[2],
    "BOR": lambda x: x[0] | x[1] | x[2],
    "BXOR": lambda x: x[0] ^ x[1] ^ x[2],
}
SIZE = 3


def given(rank: int, shape: tuple[int, ...], dtype: torch.dtype, number: int = 0) -> Tensor:
    """Return small integers, whose sum or product of three is exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randint(0, 4, shape, generator=generator).to(dtype)


def from_all_ranks(*args: Any) -> list[Tensor]:
    return [given(rank, *args) for rank in range(SIZE)]


def check(got: Tensor, expected: Tensor, case: Any) -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), case
    assert torch.equal(raw(got), raw(expected)), (case, got, expected)


def raw(tensor: Tensor) -> Tensor:
    """Return the bytes, because not every dtype supports comparison."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8)


def strided(tensor: Tensor) -> Tensor:
    """Return the same values in non-contiguous memory."""
    gaps = torch.zeros(*tensor.shape, 2).to(tensor.dtype)
    gaps[..., 0] = tensor
    return gaps[..., 0]


def reductions() -> None:
    """All forms of all_reduce, reduce and reduce_scatter."""
    rank = dist.get_rank()
    for dtype, shape, op in itertools.product(FLOATS + INTEGERS, SHAPES, OPS):
        if dtype.is_floating_point and op.startswith("B"):
            continue
        how = getattr(dist.ReduceOp, op)
        wide = torch.stack(from_all_ranks(shape, dtype))
        expected = OPS[op](wide if dtype in INTEGERS else wide.double()).to(dtype)
        for form in (torch.clone, strided):
            tensor = form(given(rank, shape, dtype))
            dist.all_reduce(tensor, how)
            check(tensor, expected, ("all_reduce", dtype, shape, op, form))
        tensor = given(rank, shape, dtype)
        dist.reduce(tensor, 1, how)
        check(tensor, expected if rank == 1 else given(rank, shape, dtype), ("reduce", dtype, shape, op))

        rows = torch.stack([torch.stack(from_all_ranks(shape, dtype, 7 + part)) for part in range(SIZE)])
        expected = OPS[op](rows[rank] if dtype in INTEGERS else rows[rank].double()).to(dtype)
        parts = [strided(given(rank, shape, dtype, 7 + part)) for part in range(SIZE)]
        output = torch.empty(shape, dtype=dtype)
        dist.reduce_scatter(output, parts, how)
        check(output, expected, ("reduce_scatter", dtype, shape, op))
        if shape:
            output = strided(torch.zeros(shape, dtype=dtype))
            dist.reduce_scatter_tensor(output, torch.cat(parts), how)
            check(output, expected, ("reduce_scatter_tensor", dtype, shape, op))


def odd_dtypes() -> None:
    """Sums of bool, complex, unsigned and 8-bit float tensors."""
    rank = dist.get_rank()
    for dtype, shape in itertools.product([torch.bool, torch.complex64, torch.float8_e4m3fn, *UNSIGNED], SHAPES):
        tensor = given(rank, shape, dtype)
        dist.all_reduce(tensor)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        check(
            tensor,
            torch.stack([part.to(wide) for part in from_all_ranks(shape, dtype)]).sum(0).to(dtype),
            (dtype, shape),
        )
    for dtype, value in ((torch.int8, 100), (torch.uint8, 100), (torch.int16, 30000), (torch.int32, 2**30)):
        tensor = torch.full((200,), value, dtype=dtype)  # long enough for vector instructions
        dist.all_reduce(tensor)
        check(tensor, (torch.full((200,), value) * SIZE).to(dtype), ("wraps around", dtype))
    tensor = torch.full((4,), float(rank + 1))
    dist.all_reduce(tensor, dist._make_nccl_premul_sum(0.5))
    check(tensor, torch.full((4,), 3.0), "premul_sum")
    mixed = [given(rank, (3,), torch.int64), given(rank, (300, 300), torch.bfloat16), given(rank, (), torch.float32)]
    dist.all_reduce_coalesced(mixed[:1])
    with dist._coalescing_manager():
        for tensor in mixed[1:]:
            dist.all_reduce(tensor)
    for got, shape, dtype in zip(
        mixed, [(3,), (300, 300), ()], [torch.int64, torch.bfloat16, torch.float32], strict=True
    ):
        check(got, torch.stack(from_all_ranks(shape, dtype)).sum(0), ("coalesced", dtype))


def movements() -> None:
    """Data movement for every dtype, with contiguous, non-contiguous and empty tensors."""
    rank, right, left = dist.get_rank(), (dist.get_rank() + 1) % SIZE, (dist.get_rank() - 1) % SIZE
    for dtype, shape in itertools.product(FLOATS + INTEGERS + OTHERS, SHAPES):
        case, inputs = (dtype, shape), from_all_ranks(shape, dtype)
        for form in (torch.clone, strided):
            tensor = form(given(rank, shape, dtype))
            dist.broadcast(tensor, 2)
            check(tensor, inputs[2], ("broadcast", *case))
            outputs = [form(torch.zeros(shape).to(dtype)) for _ in range(SIZE)]
            dist.all_gather(outputs, form(given(rank, shape, dtype)))
            dist.gather(form(given(rank, shape, dtype)), outputs if rank == 1 else None, 1)
            for output, expected in zip(outputs, inputs, strict=True):
                check(output, expected, ("gather", *case))
            output = form(torch.zeros(shape).to(dtype))
            dist.scatter(output, [form(given(0, shape, dtype, part)) for part in range(SIZE)] if rank == 0 else None)
            check(output, given(0, shape, dtype, rank), ("scatter", *case))
            dist.all_to_all(outputs, [form(given(rank, shape, dtype, part)) for part in range(SIZE)])
            for sender, output in enumerate(outputs):
                check(output, given(sender, shape, dtype, rank), ("all_to_all", *case))
            tensor = form(torch.zeros(shape).to(dtype))
            sent = form(given(rank, shape, dtype))
            exchange = [dist.P2POp(dist.isend, sent, right, tag=3), dist.P2POp(dist.irecv, tensor, left, tag=3)]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            check(tensor, inputs[left], ("ring", *case))
        if shape:
            output = torch.zeros(SIZE * shape[0], *shape[1:]).to(dtype)
            dist.all_gather_into_tensor(output, given(rank, shape, dtype))
            check(
                output,
                torch.cat([part.view(-1).view(torch.uint8) for part in inputs]).view(dtype).view(output.shape),
                case,
            )


def aliases() -> None:
    """Outputs that share memory with inputs."""
    rank = dist.get_rank()
    for count in (5, 100_000):
        buffer = torch.zeros(SIZE * count)
        own = buffer[rank * count : (rank + 1) * count]
        own.fill_(rank + 1)
        dist.all_gather_into_tensor(buffer, own)
        check(buffer, torch.arange(1.0, SIZE + 1).repeat_interleave(count), "all_gather in place")
        buffer = torch.arange(float(SIZE)).repeat_interleave(count) + 10 * rank
        dist.reduce_scatter_tensor(buffer[:count], buffer)
        check(buffer[:count], torch.full((count,), 30.0 + SIZE * rank), "reduce_scatter in place")
        buffer = torch.arange(float(SIZE)).repeat_interleave(count) + 10 * rank
        dist.all_to_all_single(buffer, buffer)
        check(buffer, (10 * torch.arange(float(SIZE)) + rank).repeat_interleave(count), "all_to_all in place")
        first = torch.full((count,), float(rank))
        outputs = [first, torch.empty(count), torch.empty(count)]  # on ranks 1 and 2, the input is the output of rank 0
        dist.all_gather(outputs, first)
        check(torch.stack(outputs), torch.arange(float(SIZE))[:, None].expand(SIZE, count).contiguous(), "all_gather")


def uneven() -> None:
    """all_to_all_single in which rank r sends r·s + 1 rows to rank s, but none if r + s = 2."""
    rank = dist.get_rank()

    def rows(sender: int, receiver: int) -> int:
        return 0 if sender + receiver == 2 else sender * receiver + 1

    for dtype in (torch.float32, torch.bfloat16, torch.bool):
        sent = [given(rank, (rows(rank, peer), 2), dtype, peer) for peer in range(SIZE)]
        output = torch.empty(sum(rows(peer, rank) for peer in range(SIZE)), 2, dtype=dtype)
        splits = [rows(peer, rank) for peer in range(SIZE)], [len(part) for part in sent]
        dist.all_to_all_single(output, torch.cat(sent), *splits)
        check(output, torch.cat([given(peer, (rows(peer, rank), 2), dtype, rank) for peer in range(SIZE)]), dtype)


def huge() -> None:
    """Messages that need several blocks, with a block size of 1000 bytes."""
    buffers.BLOCK = 1000
    rank = dist.get_rank()
    for shape in ((1000,), (5001,), (300, 301)):
        tensor = given(rank, shape, torch.uint8)
        dist.broadcast(tensor, 1)
        check(tensor, given(1, shape, torch.uint8), shape)
        tensor = given(rank, shape, torch.float32)
        dist.all_reduce(tensor)
        check(tensor, torch.stack(from_all_ranks(shape, torch.float32)).sum(0), shape)
        if rank == 0:
            dist.send(tensor, 1)
        elif rank == 1:
            got = torch.empty_like(tensor)
            dist.recv(got, 0)
            check(got, tensor, shape)


def invalid_calls() -> None:
    """Invalid calls raise with a message."""
    rank = dist.get_rank()
    calls = {
        "must divide by the group size": lambda: dist.all_to_all_single(torch.empty(4), torch.empty(4)),
        "add up to the split": lambda: dist.all_to_all_single(torch.empty(3), torch.empty(3), [1, 1, 2], [1, 1, 1]),
        "group size × input": lambda: dist.group.WORLD.all_gather_single(torch.empty(4), torch.empty(1)).wait(),
        "dense CPU and CUDA tensors": lambda: dist.broadcast(torch.eye(2).to_sparse(), 0),
        "cannot reduce": lambda: dist.all_reduce(torch.zeros(2, dtype=torch.bits8)),
    }
    for words, call in calls.items():
        with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
            call()
    if rank == 0:
        dist.send(torch.zeros(3), 1)
    if rank == 1:
        with pytest.raises(RuntimeError, match="expected 16 bytes from rank 0, got 12"):
            dist.recv(torch.zeros(4), 0)


def sums() -> None:
    reductions()
    odd_dtypes()


def moves() -> None:
    movements()
    aliases()
    uneven()
    invalid_calls()
    huge()


@pytest.mark.parametrize("function", ["sums", "moves"])
def test_operations(function: str) -> None:
    run_function(SIZE, __name__, function, timeout=150)
