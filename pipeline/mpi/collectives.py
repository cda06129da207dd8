"""The operations on one communicator, as steps: generators that ``work.py`` drives without ever blocking.

Small collectives are MPI's own. From ``LARGE`` bytes up they are pairwise exchanges, with the sums done here: on both
MPICH and Open MPI that is up to twice as fast (benchmarks/mpi_backend), 16-bit floats travel as such but add up in
float32, and the order of a sum does not depend on the library.

Tensors come detached and on the CPU. One that is not contiguous is copied first, and its result copied back. Buffers
live in a generator's frame until its requests are done.
"""

from collections.abc import Generator, Sequence
from itertools import count
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from pipeline.mpi.buffers import (
    NOTHING,
    Reduction,
    as_bytes,
    as_numbers,
    combines,
    copy,
    cut,
    memories,
    memory,
    message,
    reducible,
)
from pipeline.mpi.work import Steps

LARGE = 256 * 1024
PIECE = 2**21  # bytes of a rank reduced at a time: they stay in the processor's cache
SCRATCH = 2**24  # bytes kept for what arrives
TAGS = 32767  # MPI guarantees tags up to this one, which ``token`` has for itself
Exchange = Generator[list[MPI.Request], list[MPI.Status], Any]


class Collectives:
    """A communicator's collectives and messages. Ranks are the communicator's own."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._inner = comm.Dup()  # exchanges, apart from the user's messages
        self._tags = count()
        self._kept = torch.empty(0, dtype=torch.uint8)
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()

    # Reductions

    def all_reduce(self, tensors: list[Tensor], how: Reduction) -> Steps:
        small, requests = [], []
        for tensor in tensors:
            if not self._exchanges(tensor.nbytes, tensor.dtype):
                total = reducible(how.prepare(tensor))
                small.append((tensor, total))
                mpi_op = how.by_mpi(total.dtype)
                requests.append(self._comm.Iallreduce(MPI.IN_PLACE, as_numbers(total), mpi_op))
        yield requests
        for tensor, total in small:
            how.finish(total, self.size)
            write(tensor, total)
        for tensor in tensors:
            if self._exchanges(tensor.nbytes, tensor.dtype):
                yield from self._exchange_all_reduce(tensor, how)

    def _exchange_all_reduce(self, tensor: Tensor, how: Reduction) -> Exchange:
        """Every rank adds up one part, and the parts are gathered."""
        buffer = how.prepare(tensor).contiguous()
        parts = list(buffer.view(-1).tensor_split(self.size))
        yield from self._exchange_reduce(parts, parts[self.rank], how)
        yield from self._share(parts[self.rank], parts)
        write(tensor, buffer)

    def all_reduce_sparse(self, tensor: Tensor, how: Reduction) -> Steps:
        """Gather everyone's indices and values, whose numbers differ, and add up what falls on one index."""
        summed = how.of_tensors is torch.add and how.factor is None
        expect("all_reduce", summed, "sparse tensors can only be summed or averaged")
        own = tensor.detach().coalesce()
        number, numbers = torch.tensor([own._nnz()]), torch.empty(self.size, dtype=torch.int64)
        yield [self._comm.Iallgather(as_bytes(number), as_bytes(numbers))]
        whole = []
        for part in (own.indices().t().contiguous(), own.values().contiguous()):
            rows = [part.new_empty(n, *part.shape[1:]) for n in numbers.tolist()]
            yield from self._share(part, rows)
            whole.append(torch.cat(rows))
        total = torch.sparse_coo_tensor(whole[0].t(), whole[1], tensor.shape).coalesce()
        how.finish(total, self.size)
        with torch.no_grad():
            tensor.copy_(total)  # (a detached sparse tensor would keep the result to itself)

    def reduce(self, tensor: Tensor, how: Reduction, root: int) -> Steps:
        part = reducible(how.prepare(tensor))
        total = torch.empty_like(part) if root == self.rank else None
        mpi_op = how.by_mpi(part.dtype)
        yield [self._comm.Ireduce(as_numbers(part), None if total is None else as_numbers(total), mpi_op, root)]
        if total is not None:
            how.finish(total, self.size)
            write(tensor, total)

    def reduce_scatter(self, pairs: list[tuple[Tensor, list[Tensor]]], how: Reduction) -> Steps:
        """For each pair (output, inputs): the sum of everyone's input number ``rank``; or one input, to be cut."""
        for output, given in pairs:
            nbytes = sum([tensor.nbytes for tensor in given])
            expect("reduce_scatter", given[0].dtype == output.dtype, "output and input must have one dtype")
            expect("reduce_scatter", nbytes == output.nbytes * self.size, "input must be group size × output")
            inputs = [how.prepare(tensor) for tensor in given]
            exchanges = self._exchanges(nbytes, output.dtype)
            part = inputs[0] if exchanges else reducible(_joined(inputs))
            direct = output.is_contiguous() and output.dtype == part.dtype and not _share_memory([output], inputs)
            result = output if direct else torch.empty(output.shape, dtype=part.dtype)
            if exchanges:
                yield from self._exchange_reduce(self._cut(inputs), result.view(-1), how)
            else:
                mpi_op = how.by_mpi(part.dtype)
                yield [self._comm.Ireduce_scatter_block(as_numbers(part), as_numbers(result), mpi_op)]
                how.finish(result, self.size)
            write(output, result)

    def _exchange_reduce(self, parts: list[Tensor], result: Tensor, how: Reduction) -> Exchange:
        """Send part number i to rank i, and reduce what arrives here into ``result``, which may be this rank's part."""
        others = self.size - 1
        length = max(1, min(PIECE, SCRATCH // others) // result.element_size())
        scratch = list(self._scratch(others, min(length, len(result)), result.dtype))
        scratch.insert(self.rank, result)  # a placeholder: this rank's own part stays where it is
        for start in range(0, max(map(len, parts)), length):
            sent, target = [part[start : start + length] for part in parts], result[start : start + length]
            received = [some[: len(target)] for some in scratch]
            received[self.rank] = sent[self.rank]
            yield from self._exchange(memories(sent), memories(received))
            how.combine(received, target, received[self.rank == 0])

    def _scratch(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory for the collective that is under way; the next one gets the same, for new pages are slow."""
        nbytes = rows * columns * dtype.itemsize
        if self._kept.nbytes < nbytes:
            self._kept = torch.empty(nbytes, dtype=torch.uint8)
        return self._kept[:nbytes].view(dtype).view(rows, columns)

    # Movement, as bytes

    def broadcast(self, tensor: Tensor, root: int) -> Steps:
        buffer = tensor.contiguous()
        yield [self._comm.Ibcast(as_bytes(buffer), root)]
        if root != self.rank:
            write(tensor, buffer)

    def all_gather(self, pairs: list[tuple[list[Tensor], Tensor]]) -> Steps:
        """For each pair (outputs, input): everyone's input, in an output each, or one after the other in one output."""
        for outputs, part in pairs:
            nbytes = sum([output.nbytes for output in outputs])
            expect("all_gather", outputs[0].dtype == part.dtype, "output and input must have one dtype")
            expect("all_gather", nbytes == part.nbytes * self.size, "output must be group size × input")
            buffers, part = [output.contiguous() for output in outputs], part.contiguous()
            slots = memories(buffers) if len(buffers) > 1 else cut(memory(buffers[0]), [part.nbytes] * self.size)
            in_place = slots[self.rank].address == part.data_ptr()
            if not in_place and _share_memory(buffers, [part]):
                part = part.clone()
            if nbytes < LARGE and len(buffers) == 1:
                # FSDP2 gathers in place; MPI forbids aliases but for this one
                sent = MPI.IN_PLACE if in_place else as_bytes(part)
                yield [self._comm.Iallgather(sent, as_bytes(buffers[0]))]
            else:
                yield from self._exchange([memory(part)] * self.size, slots)
            for output, buffer in zip(outputs, buffers, strict=True):
                write(output, buffer)

    def gather(self, outputs: list[Tensor], part: Tensor, root: int) -> Steps:
        slots, part = [output.contiguous() for output in outputs], part.contiguous()
        sent = [memory(part) if peer == root else NOTHING for peer in range(self.size)]
        yield from self._exchange(sent, memories(slots) or [NOTHING] * self.size)
        for output, slot in zip(outputs, slots, strict=True):
            write(output, slot)

    def scatter(self, output: Tensor, parts: list[Tensor], root: int) -> Steps:
        slot, parts = output.contiguous(), [part.contiguous() for part in parts]
        sent = memories(parts) or [NOTHING] * self.size
        yield from self._exchange(sent, [memory(slot) if peer == root else NOTHING for peer in range(self.size)])
        write(output, slot)

    def all_to_all(self, outputs: list[Tensor], inputs: list[Tensor]) -> Steps:
        shared = _share_memory(outputs, inputs)
        sent = [_copied(part) if shared else part.contiguous() for part in inputs]
        received = [output.contiguous() for output in outputs]
        yield from self._exchange(memories(sent), memories(received))
        for output, part in zip(outputs, received, strict=True):
            write(output, part)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> Steps:
        """Rows of ``input`` to each rank, as many as ``input_splits`` says; without splits, everybody the same."""
        shared, received = _share_memory([output], [input]), output.contiguous()
        sent = _copied(input) if shared else input.contiguous()
        parts = self._rows("input", sent, input_splits)
        yield from self._exchange(parts, self._rows("output", received, output_splits))
        write(output, received)

    def _rows(self, name: str, tensor: Tensor, sizes: Sequence[int]) -> list[MPI.memory]:
        """``tensor`` cut along its first dimension, a part per rank."""
        rows = tensor.shape[0]
        sizes = sizes or [rows // self.size] * self.size
        if sum(sizes) != rows or len(sizes) != self.size:
            raise ValueError(
                f"all_to_all_single: the {name}'s {rows} rows must divide by the group size, {self.size}, "
                f"or add up to the split sizes, one per rank; these are {list(sizes)}"
            )
        row = tensor.nbytes // max(rows, 1)
        return cut(memory(tensor), [size * row for size in sizes])

    def _share(self, part: Tensor, slots: list[Tensor]) -> Exchange:
        """``part`` to everybody, and everybody's into the slots."""
        yield from self._exchange([memory(part)] * self.size, memories(slots))

    def _exchange(self, sent: list[MPI.memory], received: list[MPI.memory]) -> Exchange:
        """Part number i of ``sent`` to rank i, and what rank i sent here into ``received``; nothing for empty parts."""
        tag = next(self._tags) % TAGS
        own, kept = sent[self.rank], received[self.rank]
        if own.nbytes != kept.nbytes:
            raise ValueError(f"own part: {kept.nbytes} bytes expected, {own.nbytes} given")
        if own.address != kept.address:
            copy(kept, own)
        sources = [peer for peer, part in enumerate(received) if peer != self.rank and part.nbytes]
        requests = [self._inner.Irecv(message(received[peer]), peer, tag) for peer in sources]
        for peer, part in enumerate(sent):
            if peer != self.rank and part.nbytes:
                requests.append(self._inner.Isend(message(part), peer, tag))
        statuses = (yield requests) if requests else []
        for peer, status in zip(sources, statuses, strict=False):
            _complete(received[peer].nbytes, status, peer)

    def _exchanges(self, nbytes: int, dtype: torch.dtype) -> bool:
        return nbytes >= LARGE and self.size > 1 and combines(dtype)

    def _cut(self, tensors: list[Tensor]) -> list[Tensor]:
        """A flat part per rank: of one tensor its cuts, else the tensors themselves."""
        if len(tensors) == self.size:
            return [tensor.contiguous().view(-1) for tensor in tensors]
        return list(tensors[0].contiguous().view(-1).tensor_split(self.size))

    # Messages

    def send(self, tensor: Tensor, peer: int, tag: int) -> Steps:
        buffer = tensor.contiguous()
        yield [self._comm.Isend(as_bytes(buffer), peer, tag)]

    def recv(self, tensor: Tensor, peer: int, tag: int) -> Steps:
        buffer = tensor.contiguous()
        (status,) = yield [self._comm.Irecv(as_bytes(buffer), peer, tag)]
        _complete(buffer.nbytes, status, peer)
        write(tensor, buffer)

    def token(self, call: str, peer: int) -> Steps:
        """An empty message to (``Isend``) or from (``Irecv``) another rank."""
        yield [getattr(self._inner, call)([bytearray(), MPI.BYTE], peer, TAGS)]

    def barrier(self) -> Steps:
        yield [self._comm.Ibarrier()]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Tensors one after the other as one vector; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def _share_memory(some: list[Tensor], others: list[Tensor]) -> bool:
    storages = [{tensor.untyped_storage().data_ptr() for tensor in tensors} for tensors in (some, others)]
    return not storages[0].isdisjoint(storages[1] - {0})


def _complete(expected: int, status: MPI.Status, peer: int) -> None:
    """MPI reports a message that is too long; one that is too short is for us to see."""
    got = status.Get_elements(MPI.BYTE)
    if got != expected:
        raise ValueError(f"recv: expected {expected} bytes from rank {peer}, got {got}")


def write(target: Tensor, result: Tensor) -> None:
    """Copy a result to where it belongs, unless it is there already."""
    if target is not result:
        target.copy_(result.view(target.shape))


def expect(operation: str, condition: bool, message: str) -> None:
    """Raise ValueError unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{operation}: {message}")
