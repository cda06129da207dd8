# mypy: disable-error-code="override, assignment, misc"
# (torch's stub declares overloads for callers of a group; one that implements it is only ever called with the first)
"""The process group: ``torch.distributed``'s calls as MPI's.

Every method makes an ``Operation`` (``work.py``) of the steps that ``collectives.py`` has for it.
"""

import math
import sys
import time
import zlib
from collections.abc import Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, distributed_c10d

from pipeline.mpi.collectives import Collectives, expect
from pipeline.mpi.store import MPIStore
from pipeline.mpi.trace import GroupTrace
from pipeline.mpi.watch import Watch
from pipeline.mpi.work import Operation, Progress, Steps


def start(comm: MPI.Intracomm, progress: Progress, watch: Watch) -> None:
    """Make ``comm`` the default process group of ``torch.distributed``, backend "mpi" for the CPU.

    PyTorch knows the name "mpi", but its wheels are built without the class behind it. Ours takes that place, so
    ``new_group``, ``DeviceMesh`` and everything else make MPI groups by PyTorch's own path.
    """
    groups = _Groups(comm, progress, watch)
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

    def __init__(self, world: MPI.Intracomm, progress: Progress, watch: Watch) -> None:
        self._world = world
        self._progress = progress
        self._watch = watch
        self._creations: dict[tuple[int, ...], GroupTrace] = {}
        self.store = MPIStore(world, watch.timeout_s)  # torch keeps but its C++ half alive

    def create(self, ranks: list[int]) -> "MPIProcessGroup":
        ranks = ranks or list(range(self._world.Get_size()))
        tag = zlib.crc32(repr(ranks).encode()) % 32768  # groups made at the same time by several threads stay apart
        entry = self._creations.setdefault(tuple(ranks), self._watch.group(ranks)).begin("new_group", [])
        with entry:
            comm = self._world.Create_group(self._world.Get_group().Incl(ranks), tag)
        entry.end(None)
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        timeout = sys._getframe(1).f_locals.get("timeout")  # of new_group; PyTorch has it, but does not pass it on
        given = timeout not in (None, distributed_c10d.default_pg_timeout, timedelta(seconds=self._watch.timeout_s))
        limit_s = timeout.total_seconds() if timeout and given else math.inf
        return MPIProcessGroup(comm, self._progress, self._watch.group(ranks), limit_s)


class MPIProcessGroup(ProcessGroup):
    """One communicator as a process group. Ranks are the group's own.

    ``timeout_s``: an operation that takes longer raises in the rank that waits. Without, the job's own timeout holds.
    """

    def __init__(self, comm: MPI.Intracomm, progress: Progress, trace: GroupTrace, timeout_s: float) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())  # type: ignore[call-arg]
        self._steps = Collectives(comm)
        self._progress = progress
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
        self._trace.description = "" if description == "undefined" else description
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
        return Operation(entry, self._progress, steps, inputs, inputs if outputs is None else outputs, self._timeout_s)

    # Reductions

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Operation:
        if tensors[0].layout == torch.sparse_coo:
            return self._start("all_reduce", self._steps.all_reduce_sparse(tensors[0], _reduce_op(opts)), tensors)
        return self._start("all_reduce", self._steps.all_reduce(_locals(tensors), _reduce_op(opts)), tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Operation:
        return self._start("all_reduce_coalesced", self._steps.all_reduce(_locals(tensors), _reduce_op(opts)), tensors)

    def reduce(self, tensors: list[Tensor], opts: Any) -> Operation:
        steps = self._steps.reduce(_local(tensors[0]), _reduce_op(opts), opts.rootRank)
        return self._start("reduce", steps, tensors, peer=opts.rootRank)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Operation:
        pairs = [(_local(outputs[0]), _locals(inputs[0]))]
        return self._start("reduce_scatter", self._steps.reduce_scatter(pairs, _reduce_op(opts)), inputs[0], outputs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Operation:
        steps = self._steps.reduce_scatter([(_local(output), [_local(input)])], _reduce_op(opts))
        return self._start("reduce_scatter_single", steps, [input], [output])

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Operation:
        pairs = [(output, [input]) for output, input in zip(_locals(outputs), _locals(inputs), strict=True)]
        steps = self._steps.reduce_scatter(pairs, _reduce_op(opts))
        return self._start("reduce_scatter_single_coalesced", steps, inputs, outputs)

    # Movement

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Operation:
        steps = self._steps.broadcast(_local(tensors[0]), opts.rootRank)
        return self._start("broadcast", steps, tensors, peer=opts.rootRank)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Operation:
        steps = self._steps.all_gather([(_locals(outputs[0]), _local(inputs[0]))])
        return self._start("all_gather", steps, inputs, outputs[0])

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Operation:
        rows = zip(*map(_locals, outputs), strict=True)  # torch gives them by rank, then by tensor
        steps = self._steps.all_gather([(list(row), part) for row, part in zip(rows, _locals(inputs), strict=True)])
        return self._start("all_gather_coalesced", steps, inputs, [output for row in outputs for output in row])

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Operation:
        steps = self._steps.all_gather([([_local(output)], _local(input))])
        return self._start("all_gather_single", steps, [input], [output])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Operation:
        pairs = [([output], input) for output, input in zip(_locals(outputs), _locals(inputs), strict=True)]
        return self._start("all_gather_single_coalesced", self._steps.all_gather(pairs), inputs, outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Operation:
        row = outputs[0] if outputs else []
        steps = self._steps.gather(_locals(row), _local(inputs[0]), opts.rootRank)
        return self._start("gather", steps, inputs, row, opts.rootRank)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Operation:
        row = inputs[0] if inputs else []
        steps = self._steps.scatter(_local(outputs[0]), _locals(row), opts.rootRank)
        return self._start("scatter", steps, row, outputs, opts.rootRank)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Operation:
        return self._start("all_to_all", self._steps.all_to_all(_locals(outputs), _locals(inputs)), inputs, outputs)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
    ) -> Operation:
        received = self._split("output", _local(output), output_splits)
        sent = self._split("input", _local(input), input_splits)
        steps, sizes = self._steps.all_to_all(received, sent), (input_splits, output_splits)
        return self._start("all_to_all_single", steps, [input], [output], detail=sizes)

    def _split(self, name: str, tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """``tensor`` cut along its first dimension, a part per rank."""
        rows = tensor.shape[0]
        if not sizes:
            expect("all_to_all_single", rows % self._size == 0, f"{name} rows must divide by the group size")
            sizes = [rows // self._size] * self._size
        expect("all_to_all_single", len(sizes) == self._size, f"{name} split sizes: one per rank")
        expect("all_to_all_single", sum(sizes) == rows, f"{name} split sizes must add up to {rows} rows")
        return [tensor[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]

    # Point to point

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Operation:
        return self._start("send", self._steps.send(_local(tensors[0]), peer, tag), tensors, peer=peer, detail=tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Operation:
        return self._start("recv", self._steps.recv(_local(tensors[0]), peer, tag), tensors, peer=peer, detail=tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> Operation:
        return self._start(
            "recvAnySource", self._steps.recv(_local(tensors[0]), MPI.ANY_SOURCE, tag), tensors, detail=tag
        )

    def barrier(self, opts: Any = None) -> Operation:
        return self._start("barrier", self._steps.barrier(), [])

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
        return self._start("monitored_barrier", self._steps.token(call, peer), [], peer=peer)

    # The names torch used before 2.13
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _reduce_op(opts: Any) -> Any:
    return ReduceOp.SUM if opts is None else opts.reduceOp


def _local(tensor: Tensor) -> Tensor:
    """The tensor as plain memory, without autograd."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"the mpi backend moves dense CPU tensors, not {tensor.layout} on {tensor.device}")
    return tensor.detach()


def _locals(tensors: list[Tensor]) -> list[Tensor]:
    return [_local(tensor) for tensor in tensors]
