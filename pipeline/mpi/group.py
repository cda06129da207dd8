# mypy: disable-error-code="override, assignment, misc"
# (torch's stub declares overloads for callers of a group; one that implements it is only ever called with the first)
"""The process group: ``torch.distributed``'s calls as MPI's.

Every method makes an ``Operation`` from a generator (see ``work.py``). A tensor that is not contiguous is copied first,
and its output copied back; a buffer lives in the generator's frame until its requests are done.
"""

import math
import sys
import time
import zlib
from collections.abc import Sequence
from datetime import timedelta
from itertools import accumulate, count
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, distributed_c10d

from pipeline.mpi.buffers import as_bytes, as_numbers, average, reducible, reduction
from pipeline.mpi.store import MPIStore
from pipeline.mpi.trace import GroupTrace
from pipeline.mpi.watch import Watch
from pipeline.mpi.work import Operation, Steps

INNER_TAGS = 32767  # MPI guarantees tags up to this one, which monitored_barrier has for itself


def start(comm: MPI.Intracomm, watch: Watch) -> None:
    """Make ``comm`` the default process group of ``torch.distributed``, backend "mpi" for the CPU.

    PyTorch knows the name "mpi", but its wheels are built without the class behind it. Ours takes that place, so
    ``new_group``, ``DeviceMesh`` and everything else make MPI groups by PyTorch's own path.
    """
    groups = _Groups(comm, watch)
    distributed_c10d.ProcessGroupMPI = groups
    distributed_c10d._MPI_AVAILABLE = True
    dist.init_process_group(
        "cpu:mpi",  # by its device: for plain "mpi" PyTorch would ignore the store
        store=groups.store,
        rank=comm.Get_rank(),
        world_size=comm.Get_size(),
        timeout=timedelta(seconds=watch.timeout_s),
    )


class _Groups:
    """Makes a group from global ranks. PyTorch calls ``create`` on its members only, with the same ranks on each."""

    def __init__(self, world: MPI.Intracomm, watch: Watch) -> None:
        self._world = world
        self._watch = watch
        self.store = MPIStore(world, watch.timeout_s)  # torch keeps but its C++ half alive

    def create(self, ranks: list[int]) -> "MPIProcessGroup":
        ranks = ranks or list(range(self._world.Get_size()))
        tag = zlib.crc32(repr(ranks).encode()) % 32768  # groups made at the same time by several threads stay apart
        trace = self._watch.group(ranks)
        entry = trace.begin("new_group", [])
        with entry:
            comm = self._world.Create_group(self._world.Get_group().Incl(ranks), tag)
        entry.end(None)
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        timeout = sys._getframe(1).f_locals.get("timeout")  # of new_group; PyTorch has it, but does not pass it on
        given = timeout not in (None, distributed_c10d.default_pg_timeout, timedelta(seconds=self._watch.timeout_s))
        return MPIProcessGroup(comm, trace, timeout.total_seconds() if timeout and given else math.inf)


class MPIProcessGroup(ProcessGroup):
    """One communicator as a process group. Ranks are the group's own.

    ``timeout_s``: an operation that takes longer raises in the rank that waits. Without, the job's own timeout holds.
    """

    def __init__(self, comm: MPI.Intracomm, trace: GroupTrace, timeout_s: float) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())  # type: ignore[call-arg]
        self._comm = comm
        self._inner = comm.Dup()  # messages of our own collectives, apart from the user's
        self._sequence = count()
        self._rank = comm.Get_rank()
        self._size = comm.Get_size()
        self._timeout_s = timeout_s
        self._trace = trace

    # What torch asks a group about itself. Getters and setters are looked up by name from C++.

    def getBackendName(self) -> str:
        return "mpi"

    def getSize(self) -> int:
        return self._size

    def getRank(self) -> int:
        return self._rank

    def setGroupName(self, name: str) -> None:
        self._trace.name = name

    def getGroupName(self) -> str:
        return self._trace.name

    @property
    def group_name(self) -> str:
        return self._trace.name

    def _set_group_desc(self, description: str) -> None:
        self._trace.description = description
        super()._set_group_desc(description)

    @property
    def supports_coalescing(self) -> bool:
        return False

    def _get_backend(self, device: torch.device) -> "MPIProcessGroup":
        return self

    def _start(
        self,
        name: str,
        steps: Steps,
        inputs: list[Tensor],
        outputs: list[Tensor] | None = None,
        peer: int = -1,
        detail: Any = None,
    ) -> Operation:
        """The one place where an operation begins.

        Args:
            outputs: left out, it works in place.
            peer: the other rank, or the root.
            detail: what the trace notes besides: a message's tag, an all-to-all's sizes.
        """
        entry = self._trace.begin(name, inputs or outputs or [], peer, detail)
        return Operation(entry, steps, inputs, inputs if outputs is None else outputs, self._timeout_s)

    # Reductions

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Operation:
        if tensors[0].layout == torch.sparse_coo:
            return self._start("all_reduce", self._allreduce_sparse(tensors[0], _reduce_op(opts)), tensors)
        return self._start("all_reduce", self._allreduce(tensors, _reduce_op(opts)), tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Operation:
        return self._start("all_reduce_coalesced", self._allreduce(tensors, _reduce_op(opts)), tensors)

    def _allreduce(self, tensors: list[Tensor], op: ReduceOp) -> Steps:
        tensors = [_local(tensor) for tensor in tensors]
        sums = [reducible(tensor) for tensor in tensors]
        yield [self._comm.Iallreduce(MPI.IN_PLACE, as_numbers(s), reduction(op, s.dtype)) for s in sums]
        for tensor, total in zip(tensors, sums, strict=True):
            average(total, op, self._size)
            _write(tensor, total)

    def _allreduce_sparse(self, tensor: Tensor, op: ReduceOp) -> Steps:
        """Gather everyone's indices and values, whose numbers differ, and add up what falls on one index."""
        _expect("all_reduce", op == ReduceOp.SUM or op == ReduceOp.AVG, "sparse tensors can only be summed or averaged")
        own = tensor.detach().coalesce()
        count, counts = torch.tensor([own._nnz()]), torch.empty(self._size, dtype=torch.int64)
        yield [self._comm.Iallgather(as_bytes(count), as_bytes(counts))]
        parts = []
        for part in (own.indices().t().contiguous(), own.values().contiguous()):
            whole = part.new_empty(int(counts.sum()), *part.shape[1:])
            row = part[:1].numel() * part.element_size() if len(part) else whole[:1].nbytes
            yield [self._comm.Iallgatherv(as_bytes(part), [as_bytes(whole)[0], (counts * row).tolist(), MPI.BYTE])]
            parts.append(whole)
        total = torch.sparse_coo_tensor(parts[0].t(), parts[1], tensor.shape).coalesce()
        average(total, op, self._size)
        with torch.no_grad():
            tensor.copy_(total)  # (a detached sparse tensor would keep the result to itself)

    def reduce(self, tensors: list[Tensor], opts: Any) -> Operation:
        return self._start(
            "reduce", self._reduce(tensors, _reduce_op(opts), opts.rootRank), tensors, None, opts.rootRank
        )

    def _reduce(self, tensors: list[Tensor], op: ReduceOp, root: int) -> Steps:
        tensor = _local(*tensors)
        part = reducible(tensor)
        here = root == self._rank
        total = torch.empty_like(part) if here else None
        mpi_op = reduction(op, part.dtype)
        yield [self._comm.Ireduce(as_numbers(part), None if total is None else as_numbers(total), mpi_op, root)]
        if total is not None:
            average(total, op, self._size)
            _write(tensor, total)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Operation:
        steps = self._reduce_scatter([(outputs[0], inputs[0])], _reduce_op(opts))
        return self._start("reduce_scatter", steps, inputs[0], outputs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Operation:
        steps = self._reduce_scatter([(output, [input])], _reduce_op(opts))
        return self._start("reduce_scatter_single", steps, [input], [output])

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Operation:
        pairs = [(output, [input]) for output, input in zip(outputs, inputs, strict=True)]
        steps = self._reduce_scatter(pairs, _reduce_op(opts))
        return self._start("reduce_scatter_single_coalesced", steps, inputs, outputs)

    def _reduce_scatter(self, pairs: list[tuple[Tensor, list[Tensor]]], op: ReduceOp) -> Steps:
        outputs = [_local(output) for output, _ in pairs]
        parts = [reducible(_flat([_local(t) for t in inputs])) for _, inputs in pairs]
        for output, part in zip(outputs, parts, strict=True):
            _expect("reduce_scatter", part.numel() == output.numel() * self._size, "input must be group size × output")
        sums = [torch.empty(output.numel(), dtype=part.dtype) for output, part in zip(outputs, parts, strict=True)]
        yield [
            self._comm.Ireduce_scatter_block(as_numbers(part), as_numbers(total), reduction(op, part.dtype))
            for part, total in zip(parts, sums, strict=True)
        ]
        for output, total in zip(outputs, sums, strict=True):
            average(total, op, self._size)
            _write(output, total)

    # Movement, as bytes

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Operation:
        return self._start("broadcast", self._broadcast(tensors, opts.rootRank), tensors, peer=opts.rootRank)

    def _broadcast(self, tensors: list[Tensor], root: int) -> Steps:
        tensor = _local(*tensors)
        buffer = tensor.contiguous()
        yield [self._comm.Ibcast(as_bytes(buffer), root)]
        if root != self._rank:
            _write(tensor, buffer)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Operation:
        steps = self._allgather([(outputs[0], inputs[0])])
        return self._start("all_gather", steps, inputs, [t for row in outputs for t in row])

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Operation:
        rows = [list(row) for row in zip(*outputs, strict=True)]  # torch gives them by rank, then by tensor
        steps = self._allgather(list(zip(rows, inputs, strict=True)))
        return self._start("all_gather_coalesced", steps, inputs, [t for row in outputs for t in row])

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Operation:
        return self._start("all_gather_single", self._allgather([([output], input)]), [input], [output])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Operation:
        steps = self._allgather([([output], input) for output, input in zip(outputs, inputs, strict=True)])
        return self._start("all_gather_single_coalesced", steps, inputs, outputs)

    def _allgather(self, pairs: list[tuple[list[Tensor], Tensor]]) -> Steps:
        outputs = [[_local(output) for output in row] for row, _ in pairs]
        parts = [_local(part).contiguous() for _, part in pairs]
        whole = []
        for row, part in zip(outputs, parts, strict=True):
            total = sum(output.numel() for output in row)
            _expect("all_gather", total == part.numel() * self._size, "output must be group size × input")
            _expect("all_gather", row[0].dtype == part.dtype, "output and input must have one dtype")
            direct = len(row) == 1 and row[0].is_contiguous()
            whole.append(row[0].view(-1) if direct else torch.empty(total, dtype=part.dtype))
        yield [self._gather_into(all_, part) for all_, part in zip(whole, parts, strict=True)]
        for row, all_ in zip(outputs, whole, strict=True):
            _unflatten(all_, row)

    def _gather_into(self, whole: Tensor, part: Tensor) -> MPI.Request:
        own = whole[self._rank * part.numel() : (self._rank + 1) * part.numel()]
        if own.data_ptr() == part.data_ptr():  # FSDP2 gathers in place; MPI forbids aliases but for this one
            return self._comm.Iallgather(MPI.IN_PLACE, as_bytes(whole))
        return self._comm.Iallgather(as_bytes(part), as_bytes(whole))

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Operation:
        rows = outputs[0] if outputs else []
        return self._start("gather", self._gather(rows, inputs[0], opts.rootRank), inputs, rows, opts.rootRank)

    def _gather(self, outputs: list[Tensor], input: Tensor, root: int) -> Steps:
        part = _local(input).contiguous()
        whole = torch.empty(self._size * part.numel(), dtype=part.dtype) if root == self._rank else None
        yield [self._comm.Igather(as_bytes(part), None if whole is None else as_bytes(whole), root)]
        if whole is not None:
            _unflatten(whole, [_local(output) for output in outputs])

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Operation:
        parts = inputs[0] if inputs else []
        return self._start("scatter", self._scatter(outputs[0], parts, opts.rootRank), parts, outputs, opts.rootRank)

    def _scatter(self, output: Tensor, inputs: list[Tensor], root: int) -> Steps:
        output = _local(output)
        whole = _flat([_local(t) for t in inputs]) if root == self._rank else None
        part = output.contiguous()
        yield [self._comm.Iscatter(None if whole is None else as_bytes(whole), as_bytes(part), root)]
        _write(output, part)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Operation:
        sent = [_local(t).contiguous() for t in inputs]
        steps = self._alltoall([_local(t) for t in outputs], sent)
        return self._start("all_to_all", steps, inputs, outputs)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
    ) -> Operation:
        received = self._split("output", _local(output), output_splits)
        sent = [part.contiguous() for part in self._split("input", _local(input), input_splits)]
        steps, sizes = self._alltoall(received, sent), (input_splits, output_splits)
        return self._start("all_to_all_single", steps, [input], [output], detail=sizes)

    def _split(self, name: str, tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """``tensor`` cut along its first dimension, a part per rank."""
        rows = tensor.shape[0]
        if not sizes:
            _expect("all_to_all_single", rows % self._size == 0, f"{name} rows must divide by the group size")
            sizes = [rows // self._size] * self._size
        _expect("all_to_all_single", len(sizes) == self._size, f"{name} split sizes: one per rank")
        _expect("all_to_all_single", sum(sizes) == rows, f"{name} split sizes must add up to {rows} rows")
        return [tensor[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def _alltoall(self, outputs: list[Tensor], sent: list[Tensor]) -> Steps:
        received = [output.contiguous() for output in outputs]
        _expect("all_to_all", sent[self._rank].nbytes == received[self._rank].nbytes, "own part: sizes differ")
        received[self._rank].view(-1).copy_(sent[self._rank].view(-1))
        others = [peer for peer in range(self._size) if peer != self._rank]
        # Pairwise exchange: MPICH's Ialltoallv is many times slower for large messages.
        comm, tag = self._inner, next(self._sequence) % INNER_TAGS
        arrivals = [comm.Irecv(as_bytes(received[peer]), peer, tag) for peer in others]
        yield arrivals + [comm.Isend(as_bytes(sent[peer]), peer, tag) for peer in others]
        for output, part in zip(outputs, received, strict=True):
            _write(output, part)

    # Point to point

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Operation:
        return self._start("send", self._send(tensors, peer, tag), tensors, peer=peer, detail=tag)

    def _send(self, tensors: list[Tensor], peer: int, tag: int) -> Steps:
        buffer = _local(*tensors).contiguous()
        yield [self._comm.Isend(as_bytes(buffer), peer, tag)]

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Operation:
        return self._start("recv", self._recv(tensors, peer, tag), tensors, peer=peer, detail=tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> Operation:
        return self._start("recvAnySource", self._recv(tensors, MPI.ANY_SOURCE, tag), tensors, detail=tag)

    def _recv(self, tensors: list[Tensor], peer: int, tag: int) -> Steps:
        tensor = _local(*tensors)
        buffer = tensor.contiguous()
        (status,) = yield [self._comm.Irecv(as_bytes(buffer), peer, tag)]
        got = status.Get_count(MPI.BYTE)
        _expect("recv", got == buffer.nbytes, f"expected {buffer.nbytes} bytes from rank {peer}, got {got}")
        _write(tensor, buffer)

    def barrier(self, opts: Any = None) -> Operation:
        return self._start("barrier", self._barrier(), [])

    def _barrier(self) -> Steps:
        yield [self._comm.Ibarrier()]

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier of which rank 0 says who did not come within ``timeout``.

        Raises:
            RuntimeError: on rank 0 if a rank did not come; on the others if rank 0 did not answer.
        """
        limit_s = self._timeout_s if timeout is None else timeout.total_seconds()
        deadline = time.monotonic() + limit_s
        others = range(1, self._size)
        if self._rank != 0:
            self._token("Isend", 0)
            if not self._token("Irecv", 0).finished_by(deadline):
                raise RuntimeError(
                    f"Rank {self._rank} successfully reached monitoredBarrier, but received errors while waiting for "
                    f"send/recv from rank 0: no answer within {limit_s:g} s"
                )
            return
        if limit_s <= 0:
            raise RuntimeError(f"Rank 0 timed out in monitoredBarrier after {limit_s:g} s")
        arrivals = [self._token("Irecv", peer) for peer in others]
        missing = [peer for peer, arrival in zip(others, arrivals, strict=True) if not arrival.finished_by(deadline)]
        if missing:
            names = ", ".join(map(str, missing)) if wait_all_ranks else missing[0]
            rank = "Ranks" if wait_all_ranks else "Rank"
            raise RuntimeError(f"{rank} {names} failed to pass monitoredBarrier in {limit_s:g} s")
        for peer in others:
            self._token("Isend", peer)

    def _token(self, call: str, peer: int) -> Operation:
        """An empty message of ``monitored_barrier``."""

        def steps() -> Steps:
            yield [getattr(self._inner, call)([bytearray(), MPI.BYTE], peer, INNER_TAGS)]

        return self._start("monitored_barrier", steps(), [], peer=peer)

    # The names torch used before 2.13
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _reduce_op(opts: Any) -> Any:
    return ReduceOp.SUM if opts is None else opts.reduceOp


def _local(tensor: Tensor) -> Tensor:
    """The tensor as plain memory: no autograd, and on the CPU."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"the mpi backend moves dense CPU tensors, not {tensor.layout} on {tensor.device}")
    return tensor.detach()


def _flat(tensors: list[Tensor]) -> Tensor:
    """Tensors one after the other as one vector, without a copy if there is but one contiguous tensor."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def _write(target: Tensor, result: Tensor) -> None:
    """Copy a result to where it belongs, unless it is there already."""
    if target.data_ptr() != result.data_ptr() or not target.is_contiguous():
        target.copy_(result.view(target.shape))


def _unflatten(whole: Tensor, targets: list[Tensor]) -> None:
    for target, part in zip(targets, whole.split([t.numel() for t in targets]), strict=True):
        _write(target, part)


def _expect(name: str, condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {message}")
