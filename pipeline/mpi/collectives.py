"""The operations on one communicator, as steps: generators that ``work.py`` drives without ever blocking.

Small collectives are MPI's own. From ``LARGE`` bytes up they are pairwise exchanges, with the sums done here: on both
MPICH and Open MPI that is up to twice as fast (benchmarks/mpi_backend), 16-bit floats travel as such but add up in
float32, and the order of a sum does not depend on the library.

Tensors come detached and on the CPU. One that is not contiguous is copied first, and its result copied back. Buffers
live in a generator's frame until its requests are done.
"""

from collections.abc import Generator
from itertools import count
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor
from torch.distributed import ReduceOp

from pipeline.mpi.buffers import as_bytes, as_numbers, average, combine, combines, premultiplied, reducible, reduction
from pipeline.mpi.work import Steps

LARGE = 256 * 1024
TAGS = 32767  # MPI guarantees tags up to this one, which ``token`` has for itself
Exchange = Generator[list[MPI.Request], list[MPI.Status], Any]


class Collectives:
    """A communicator's collectives and messages. Ranks are the communicator's own."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._inner = comm.Dup()  # exchanges, apart from the user's messages
        self._tags = count()
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()

    # Reductions

    def all_reduce(self, tensors: list[Tensor], op: ReduceOp) -> Steps:
        small = [tensor for tensor in tensors if not self._exchanges(tensor)]
        sums = [reducible(premultiplied(tensor, op)) for tensor in small]
        yield [self._comm.Iallreduce(MPI.IN_PLACE, as_numbers(s), reduction(op, s.dtype)) for s in sums]
        for tensor, total in zip(small, sums, strict=True):
            average(total, op, self.size)
            write(tensor, total)
        for tensor in tensors:
            if self._exchanges(tensor):
                yield from self._exchange_all_reduce(tensor, op)

    def _exchange_all_reduce(self, tensor: Tensor, op: ReduceOp) -> Exchange:
        """Every rank adds up one part, and the parts are gathered."""
        buffer = premultiplied(tensor, op).contiguous()
        parts = list(buffer.view(-1).tensor_split(self.size))
        parts[self.rank].copy_((yield from self._exchange_reduce(parts, op)))
        yield from self._exchange([parts[self.rank]] * self.size, parts)
        write(tensor, buffer)

    def all_reduce_sparse(self, tensor: Tensor, op: ReduceOp) -> Steps:
        """Gather everyone's indices and values, whose numbers differ, and add up what falls on one index."""
        expect("all_reduce", op == ReduceOp.SUM or op == ReduceOp.AVG, "sparse tensors can only be summed or averaged")
        own = tensor.detach().coalesce()
        number, numbers = torch.tensor([own._nnz()]), torch.empty(self.size, dtype=torch.int64)
        yield [self._comm.Iallgather(as_bytes(number), as_bytes(numbers))]
        whole = []
        for part in (own.indices().t().contiguous(), own.values().contiguous()):
            rows = [part.new_empty(n, *part.shape[1:]) for n in numbers.tolist()]
            yield from self._exchange([part] * self.size, rows)
            whole.append(torch.cat(rows))
        total = torch.sparse_coo_tensor(whole[0].t(), whole[1], tensor.shape).coalesce()
        average(total, op, self.size)
        with torch.no_grad():
            tensor.copy_(total)  # (a detached sparse tensor would keep the result to itself)

    def reduce(self, tensor: Tensor, op: ReduceOp, root: int) -> Steps:
        part = reducible(premultiplied(tensor, op))
        total = torch.empty_like(part) if root == self.rank else None
        mpi_op = reduction(op, part.dtype)
        yield [self._comm.Ireduce(as_numbers(part), None if total is None else as_numbers(total), mpi_op, root)]
        if total is not None:
            average(total, op, self.size)
            write(tensor, total)

    def reduce_scatter(self, pairs: list[tuple[Tensor, list[Tensor]]], op: ReduceOp) -> Steps:
        """For each pair (output, inputs): the sum of everyone's input number ``rank``; or one input, to be cut."""
        for output, given in pairs:
            inputs = [premultiplied(tensor, op) for tensor in given]
            total = sum(tensor.numel() for tensor in inputs)
            expect("reduce_scatter", total == output.numel() * self.size, "input must be group size × output")
            expect("reduce_scatter", inputs[0].dtype == output.dtype, "output and input must have one dtype")
            if self._exchanges(*inputs):
                result = yield from self._exchange_reduce(self._cut(inputs), op)
            else:
                part = reducible(_joined(inputs))
                result = torch.empty(output.numel(), dtype=part.dtype)
                mpi_op = reduction(op, part.dtype)
                yield [self._comm.Ireduce_scatter_block(as_numbers(part), as_numbers(result), mpi_op)]
                average(result, op, self.size)
            write(output, result)

    def _exchange_reduce(self, parts: list[Tensor], op: ReduceOp) -> Exchange:
        """Send part number i to rank i; the reduction of what arrives here."""
        received = [
            parts[self.rank] if i == self.rank else torch.empty_like(parts[self.rank]) for i in range(self.size)
        ]
        yield from self._exchange(parts, received)
        total = combine(received, op)
        average(total, op, self.size)
        return total

    # Movement, as bytes

    def broadcast(self, tensor: Tensor, root: int) -> Steps:
        buffer = tensor.contiguous()
        yield [self._comm.Ibcast(as_bytes(buffer), root)]
        if root != self.rank:
            write(tensor, buffer)

    def all_gather(self, pairs: list[tuple[list[Tensor], Tensor]]) -> Steps:
        """For each pair (outputs, input): everyone's input, in an output each, or one after the other in one output."""
        for outputs, part in pairs:
            total = sum(output.numel() for output in outputs)
            expect("all_gather", total == part.numel() * self.size, "output must be group size × input")
            expect("all_gather", outputs[0].dtype == part.dtype, "output and input must have one dtype")
            buffers = [output.contiguous() for output in outputs]
            slots = self._cut(buffers)
            own, part = slots[self.rank], part.contiguous()
            if own.data_ptr() != part.data_ptr() and _share_memory(buffers, [part]):
                part = part.clone()
            if total * part.element_size() < LARGE and len(buffers) == 1:
                # FSDP2 gathers in place; MPI forbids aliases but for this one
                sent = MPI.IN_PLACE if own.data_ptr() == part.data_ptr() else as_bytes(part)
                yield [self._comm.Iallgather(sent, as_bytes(buffers[0]))]
            else:
                yield from self._exchange([part] * self.size, slots)
            for output, buffer in zip(outputs, buffers, strict=True):
                write(output, buffer)

    def gather(self, outputs: list[Tensor], part: Tensor, root: int) -> Steps:
        slots = [output.contiguous() for output in outputs]
        nothing = part.new_empty(0)
        sent = [part.contiguous() if peer == root else nothing for peer in range(self.size)]
        yield from self._exchange(sent, slots or [nothing] * self.size)
        for output, slot in zip(outputs, slots, strict=True):
            write(output, slot)

    def scatter(self, output: Tensor, parts: list[Tensor], root: int) -> Steps:
        slot = output.contiguous()
        nothing = output.new_empty(0)
        sent = [part.contiguous() for part in parts] or [nothing] * self.size
        yield from self._exchange(sent, [slot if peer == root else nothing for peer in range(self.size)])
        write(output, slot)

    def all_to_all(self, outputs: list[Tensor], inputs: list[Tensor]) -> Steps:
        shared = _share_memory(outputs, inputs)
        sent = [part.clone() if shared else part.contiguous() for part in inputs]
        received = [output.contiguous() for output in outputs]
        yield from self._exchange(sent, received)
        for output, part in zip(outputs, received, strict=True):
            write(output, part)

    def _exchange(self, sent: list[Tensor], received: list[Tensor]) -> Exchange:
        """Part number i of ``sent`` to rank i, and what rank i sent here into ``received``; nothing for empty parts."""
        tag = next(self._tags) % TAGS
        own, kept = sent[self.rank], received[self.rank]
        expect("own part", own.nbytes == kept.nbytes, f"{kept.nbytes} bytes expected, {own.nbytes} given")
        if own.data_ptr() != kept.data_ptr():
            kept.view(-1).copy_(own.view(-1))
        sources = [peer for peer in range(self.size) if peer != self.rank and received[peer].nbytes]
        requests = [self._inner.Irecv(as_bytes(received[peer]), peer, tag) for peer in sources]
        for peer, part in enumerate(sent):
            if peer != self.rank and part.nbytes:
                requests.append(self._inner.Isend(as_bytes(part), peer, tag))
        statuses = (yield requests) if requests else []
        for peer, status in zip(sources, statuses, strict=False):
            _complete(received[peer], status, peer)

    def _exchanges(self, *tensors: Tensor) -> bool:
        return sum(tensor.nbytes for tensor in tensors) >= LARGE and self.size > 1 and combines(tensors[0].dtype)

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
        _complete(buffer, status, peer)
        write(tensor, buffer)

    def token(self, call: str, peer: int) -> Steps:
        """An empty message to (``Isend``) or from (``Irecv``) another rank."""
        yield [getattr(self._inner, call)([bytearray(), MPI.BYTE], peer, TAGS)]

    def barrier(self) -> Steps:
        yield [self._comm.Ibarrier()]


def _joined(tensors: list[Tensor]) -> Tensor:
    """Tensors one after the other as one vector, without a copy if there is but one contiguous tensor."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def _share_memory(some: list[Tensor], others: list[Tensor]) -> bool:
    storages = [{tensor.untyped_storage().data_ptr() for tensor in tensors} for tensors in (some, others)]
    return bool(storages[0] & storages[1] - {0})


def _complete(buffer: Tensor, status: MPI.Status, peer: int) -> None:
    """MPI reports a message that is too long; one that is too short is for us to see."""
    got = status.Get_elements(MPI.BYTE)
    expect("recv", got == buffer.nbytes, f"expected {buffer.nbytes} bytes from rank {peer}, got {got}")


def write(target: Tensor, result: Tensor) -> None:
    """Copy a result to where it belongs, unless it is there already."""
    if target.data_ptr() != result.data_ptr() or not target.is_contiguous():
        target.copy_(result.view(target.shape))


def expect(operation: str, condition: bool, message: str) -> None:
    """Raise ValueError unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{operation}: {message}")
