"""The operations of one communicator as steps: generators that ``work.py`` advances without blocking.

Small collectives use MPI's own implementation. From ``LARGE`` bytes on, they are pairwise exchanges with the reduction
computed here. This is up to twice as fast on MPICH and Open MPI (benchmarks/mpi_backend), sends 16-bit floats as such
but accumulates them in float32, and makes the order of a sum independent of the library. For R ranks:

    exchange          rank i sends part j of its parts to rank j
    reduce-scatter    exchange the R parts of every input; rank j reduces the R versions of part j       [1]
    all-reduce        reduce-scatter [1], then all-gather the reduced parts                              [2]

Tensors are detached and on the CPU. A tensor that is not contiguous is copied, and its result is copied back. Local
variables of a generator keep the buffers alive until its requests have completed.
"""

from collections.abc import Generator, Sequence
from itertools import count
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from pipeline.mpi.buffers import (
    EMPTY,
    REDUCED_BY_MPI_ONLY,
    Reduction,
    as_bytes,
    as_numbers,
    copy,
    memories,
    memory,
    message,
    reducible,
    split,
)
from pipeline.mpi.work import Steps

LARGE = 256 * 1024  # bytes
PIECE = 2**21  # bytes per rank that are reduced at a time, so that they stay in the processor's cache
SCRATCH = 2**24  # bytes of the receive buffer
TAGS = 32767  # the largest tag that MPI guarantees; reserved for ``token``
Exchange = Generator[list[MPI.Request], list[MPI.Status], Any]


class Collectives:
    """Collectives and messages of one communicator. Ranks are relative to it."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._inner = comm.Dup()  # for exchanges, separate from the user's messages
        self._tags = count()
        self._scratch_bytes = torch.empty(0, dtype=torch.uint8)
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
            copy_result(tensor, total)
        for tensor in tensors:
            if self._exchanges(tensor.nbytes, tensor.dtype):
                yield from self._exchange_all_reduce(tensor, how)

    def _exchange_all_reduce(self, tensor: Tensor, how: Reduction) -> Exchange:
        buffer = how.prepare(tensor).contiguous()
        parts = list(buffer.view(-1).tensor_split(self.size))
        yield from self._exchange_reduce(parts, parts[self.rank], how)  # [1]
        yield from self._share(parts[self.rank], parts)  # [2]
        copy_result(tensor, buffer)

    def all_reduce_sparse(self, tensor: Tensor, how: Reduction) -> Steps:
        """Gather the indices and values of all ranks, whose counts differ, and sum the values of equal indices."""
        summed = how.torch_op is torch.add and how.factor is None
        expect("all_reduce", summed, "sparse tensors can only be summed or averaged")
        own = tensor.detach().coalesce()
        number, numbers = torch.tensor([own._nnz()]), torch.empty(self.size, dtype=torch.int64)
        yield [self._comm.Iallgather(as_bytes(number), as_bytes(numbers))]
        gathered = []
        for part in (own.indices().t().contiguous(), own.values().contiguous()):
            rows = [part.new_empty(n, *part.shape[1:]) for n in numbers.tolist()]
            yield from self._share(part, rows)
            gathered.append(torch.cat(rows))
        total = torch.sparse_coo_tensor(gathered[0].t(), gathered[1], tensor.shape).coalesce()
        how.finish(total, self.size)
        with torch.no_grad():
            tensor.copy_(total)  # a detached sparse tensor would not pass the result on to the original

    def reduce(self, tensor: Tensor, how: Reduction, root: int) -> Steps:
        part = reducible(how.prepare(tensor))
        total = torch.empty_like(part) if root == self.rank else None
        mpi_op = how.by_mpi(part.dtype)
        yield [self._comm.Ireduce(as_numbers(part), None if total is None else as_numbers(total), mpi_op, root)]
        if total is not None:
            how.finish(total, self.size)
            copy_result(tensor, total)

    def reduce_scatter(self, tensors: list[Tensor], outputs: list[Tensor], how: Reduction) -> Steps:
        """Reduce-scatter into each output. Its inputs are one tensor per rank or one of group size × output."""
        for number, output in enumerate(outputs):
            given = tensors[number :: len(outputs)]
            nbytes = sum([tensor.nbytes for tensor in given])
            expect("reduce_scatter", given[0].dtype == output.dtype, "output and input must have one dtype")
            expect("reduce_scatter", nbytes == output.nbytes * self.size, "input must be group size × output")
            inputs = [how.prepare(tensor) for tensor in given]
            exchanges = self._exchanges(nbytes, output.dtype)
            part = inputs[0] if exchanges else reducible(_joined(inputs))
            direct = output.is_contiguous() and output.dtype == part.dtype and not _share_memory([output], inputs)
            result = output if direct else torch.empty(output.shape, dtype=part.dtype)
            if exchanges:
                yield from self._exchange_reduce(self._parts(inputs), result.view(-1), how)
            else:
                mpi_op = how.by_mpi(part.dtype)
                yield [self._comm.Ireduce_scatter_block(as_numbers(part), as_numbers(result), mpi_op)]
                how.finish(result, self.size)
            copy_result(output, result)

    def _exchange_reduce(self, parts: list[Tensor], result: Tensor, how: Reduction) -> Exchange:
        """Send part i to rank i and reduce the received parts into ``result``, which may be this rank's own part."""
        others = self.size - 1
        length = max(1, min(PIECE, SCRATCH // others) // result.element_size())
        scratch = list(self._scratch(others, min(length, len(result)), result.dtype))
        scratch.insert(self.rank, result)  # a placeholder: this rank's own part is not copied
        for start in range(0, max(map(len, parts)), length):
            sent, target = [part[start : start + length] for part in parts], result[start : start + length]
            received = [row[: len(target)] for row in scratch]
            received[self.rank] = sent[self.rank]
            yield from self._exchange(memories(sent), memories(received))
            how.combine(received, target, received[self.rank == 0])

    def _scratch(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return temporary memory for the current collective. It is reused, because touching new pages is slow."""
        nbytes = rows * columns * dtype.itemsize
        if self._scratch_bytes.nbytes < nbytes:
            self._scratch_bytes = torch.empty(nbytes, dtype=torch.uint8)
        return self._scratch_bytes[:nbytes].view(dtype).view(rows, columns)

    # Data movement, as bytes

    def broadcast(self, tensor: Tensor, root: int) -> Steps:
        buffer = tensor.contiguous()
        yield [self._comm.Ibcast(as_bytes(buffer), root)]
        if root != self.rank:
            copy_result(tensor, buffer)

    def all_gather(self, parts: list[Tensor], tensors: list[Tensor]) -> Steps:
        """Gather each part. Its outputs are one tensor per rank or one of group size × part.

        tensors: the outputs of all parts, ordered by rank, then by part.
        """
        for number, part in enumerate(parts):
            outputs = tensors[number :: len(parts)]
            nbytes = sum([output.nbytes for output in outputs])
            expect("all_gather", outputs[0].dtype == part.dtype, "output and input must have one dtype")
            expect("all_gather", nbytes == part.nbytes * self.size, "output must be group size × input")
            buffers, part = [output.contiguous() for output in outputs], part.contiguous()
            slots = memories(buffers) if len(buffers) > 1 else split(memory(buffers[0]), [part.nbytes] * self.size)
            in_place = slots[self.rank].address == part.data_ptr()
            if not in_place and _share_memory(buffers, [part]):
                part = part.clone()
            if nbytes < LARGE and len(buffers) == 1:
                # FSDP2 gathers in place; MPI forbids aliased buffers except for IN_PLACE
                sent = MPI.IN_PLACE if in_place else as_bytes(part)
                yield [self._comm.Iallgather(sent, as_bytes(buffers[0]))]
            else:
                yield from self._exchange([memory(part)] * self.size, slots)
            for output, buffer in zip(outputs, buffers, strict=True):
                copy_result(output, buffer)

    def gather(self, parts: list[Tensor], outputs: list[Tensor], root: int) -> Steps:
        slots, part = [output.contiguous() for output in outputs], parts[0].contiguous()
        sent = [memory(part) if peer == root else EMPTY for peer in range(self.size)]
        yield from self._exchange(sent, memories(slots) or [EMPTY] * self.size)
        for output, slot in zip(outputs, slots, strict=True):
            copy_result(output, slot)

    def scatter(self, parts: list[Tensor], outputs: list[Tensor], root: int) -> Steps:
        slot, parts = outputs[0].contiguous(), [part.contiguous() for part in parts]
        sent = memories(parts) or [EMPTY] * self.size
        yield from self._exchange(sent, [memory(slot) if peer == root else EMPTY for peer in range(self.size)])
        copy_result(outputs[0], slot)

    def all_to_all(self, inputs: list[Tensor], outputs: list[Tensor]) -> Steps:
        sent, received = _separate(inputs, outputs), [output.contiguous() for output in outputs]
        yield from self._exchange(memories(sent), memories(received))
        for output, part in zip(outputs, received, strict=True):
            copy_result(output, part)

    def all_to_all_single(
        self, inputs: list[Tensor], outputs: list[Tensor], output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> Steps:
        """Send ``input_splits[i]`` rows of the only input to rank i; without splits, the same number to every rank."""
        [sent], received = _separate(inputs, outputs), outputs[0].contiguous()
        parts = self._rows("input", sent, input_splits)
        yield from self._exchange(parts, self._rows("output", received, output_splits))
        copy_result(outputs[0], received)

    def _rows(self, name: str, tensor: Tensor, sizes: Sequence[int]) -> list[MPI.memory]:
        """Split ``tensor`` along its first dimension into one part per rank."""
        rows = tensor.shape[0]
        sizes = sizes or [rows // self.size] * self.size
        if sum(sizes) != rows or len(sizes) != self.size:
            raise ValueError(
                f"all_to_all_single: the {name}'s {rows} rows must divide by the group size, {self.size}, "
                f"or add up to the split sizes, one per rank; these are {list(sizes)}"
            )
        row = tensor.nbytes // max(rows, 1)
        return split(memory(tensor), [size * row for size in sizes])

    def _share(self, part: Tensor, slots: list[Tensor]) -> Exchange:
        """All-gather ``part`` into ``slots``."""
        yield from self._exchange([memory(part)] * self.size, memories(slots))

    def _exchange(self, sent: list[MPI.memory], received: list[MPI.memory]) -> Exchange:
        """Send ``sent[i]`` to rank i and receive ``received[i]`` from it. Empty parts cause no message."""
        tag = next(self._tags) % TAGS
        own, target = sent[self.rank], received[self.rank]
        if own.nbytes != target.nbytes:
            raise ValueError(f"this rank's own part: expected {target.nbytes} bytes, got {own.nbytes}")
        if own.address != target.address:
            copy(target, own)
        sources = [peer for peer, part in enumerate(received) if peer != self.rank and part.nbytes]
        requests = [self._inner.Irecv(message(received[peer]), peer, tag) for peer in sources]
        for peer, part in enumerate(sent):
            if peer != self.rank and part.nbytes:
                requests.append(self._inner.Isend(message(part), peer, tag))
        statuses = (yield requests) if requests else []
        for peer, status in zip(sources, statuses, strict=False):
            _complete(received[peer].nbytes, status, peer)

    def _exchanges(self, nbytes: int, dtype: torch.dtype) -> bool:
        return nbytes >= LARGE and self.size > 1 and dtype not in REDUCED_BY_MPI_ONLY

    def _parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return one flat part per rank: the tensors themselves, or the parts of a single tensor."""
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
        copy_result(tensor, buffer)

    def token(self, call: str, peer: int) -> Steps:
        """Send (``Isend``) or receive (``Irecv``) an empty message."""
        yield [getattr(self._inner, call)([bytearray(), MPI.BYTE], peer, TAGS)]

    def barrier(self) -> Steps:
        yield [self._comm.Ibarrier()]


def _separate(inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Return the inputs as contiguous tensors, copied if inputs and outputs share memory."""
    shared = _share_memory(outputs, inputs)
    return [tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous() for tensor in inputs]


def _joined(tensors: list[Tensor]) -> Tensor:
    """Concatenate tensors to one vector. A single tensor is returned unchanged."""
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def _share_memory(outputs: list[Tensor], inputs: list[Tensor]) -> bool:
    storages = [{tensor.untyped_storage().data_ptr() for tensor in tensors} for tensors in (outputs, inputs)]
    return not storages[0].isdisjoint(storages[1] - {0})


def _complete(expected: int, status: MPI.Status, peer: int) -> None:
    """Raise ValueError if a message is too short. MPI itself reports one that is too long."""
    got = status.Get_elements(MPI.BYTE)
    if got != expected:
        raise ValueError(f"recv: expected {expected} bytes from rank {peer}, got {got}")


def copy_result(target: Tensor, result: Tensor) -> None:
    """Copy ``result`` to ``target`` unless it is the same tensor."""
    if target is not result:
        target.copy_(result.view(target.shape))


def expect(operation: str, condition: bool, message: str) -> None:
    """Raise ValueError unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{operation}: {message}")
