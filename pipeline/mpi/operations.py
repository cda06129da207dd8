# mypy: disable-error-code="override, assignment, misc"
# (torch's stubs declare overloads for the callers of a group; an implementation is only called with the first one)
"""The methods that ``torch.distributed`` calls on a process group.

Every method creates an ``Operation`` (``work.py``) from the steps that ``collectives.py`` defines for it.
"""

import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor
from torch.distributed import ReduceOp

from pipeline.mpi.agreement import Agreement
from pipeline.mpi.buffers import Reduction, reduction
from pipeline.mpi.collectives import Collectives
from pipeline.mpi.staging import Moves, direct, on_device, staged
from pipeline.mpi.trace import POINT_TO_POINT, GroupTrace
from pipeline.mpi.work import Operation, ProgressEngine, Steps


class Operations:
    """Operations of one communicator under the names that PyTorch calls. Ranks are relative to the group.

    Args:
        comm: communicator of the group.
        progress: engine that advances the operations of all groups.
        trace: record of the group's operations.
        timeout_s: longest wait for an operation before the waiting rank raises; ``math.inf`` for no limit.
        cuda_aware: whether MPI may access device memory.
    """

    def __init__(
        self, comm: MPI.Intracomm, progress: ProgressEngine, trace: GroupTrace, timeout_s: float, cuda_aware: bool
    ) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())  # type: ignore[call-arg]
        self._steps = Collectives(comm)
        self._progress = progress
        self._rank = comm.Get_rank()
        self._size = comm.Get_size()
        self._timeout_s = timeout_s
        self._cuda_aware = cuda_aware
        self._trace = trace
        self._last: weakref.ref[Operation] | None = None
        self._agree = Agreement(comm) if dist.get_debug_level() == dist.DebugLevel.DETAIL else None

    @property
    def supports_coalescing(self) -> bool:
        return False

    def set_names(self, name: str, description: str | None) -> None:
        """Set the name and description of the group in reports."""
        self._trace.name = name
        self._trace.description = "" if description in (None, "undefined") else str(description)

    def getBackendName(self) -> str:
        return "mpi"

    def _start(
        self,
        name: str,
        moves: Moves,
        inputs: list[Tensor],
        outputs: list[Tensor] | None = None,
        peer: int = -1,
        detail: Any = None,
    ) -> Operation:
        """Start an operation on tensors.

        Args:
            name: name of the operation in reports.
            moves: returns the steps for inputs and outputs in memory that MPI can access.
            inputs: input tensors.
            outputs: output tensors; None if the operation works in place.
            peer: the other rank or the root; -1 for none.
            detail: for the trace: tag of a message or sizes of an all-to-all.
        """
        outputs = inputs if outputs is None else outputs
        first = (inputs or outputs)[:1]
        if first and on_device(first[0]):
            message = name in POINT_TO_POINT
            aware = message and self._cuda_aware
            steps = direct(moves, inputs, outputs) if aware else staged(moves, inputs, outputs, send_now=message)
        else:
            detached = _detached(inputs)
            steps = moves(detached, detached if outputs is inputs else _detached(outputs))
        return self._begin(name, steps, inputs, outputs, peer, detail)

    def _begin(
        self, name: str, steps: Steps, inputs: list[Tensor], outputs: list[Tensor], peer: int = -1, detail: Any = None
    ) -> Operation:
        """Create and start an operation.

        The collectives of a group run one after the other in the order of their calls. Otherwise, the messages of one
        collective could overtake later rounds of the previous one on some of the ranks.
        """
        entry = self._trace.begin(name, inputs or outputs, peer, detail)
        if name in POINT_TO_POINT:
            return Operation(entry, self._progress, steps, inputs, outputs, self._timeout_s)
        if self._agree is not None:
            steps = self._agree.before(steps, entry)
        previous = None if self._last is None else self._last()
        if previous is not None and not previous.advance():
            steps = _after(previous, steps)
        operation = Operation(entry, self._progress, steps, inputs, outputs, self._timeout_s)
        self._last = weakref.ref(operation)
        return operation

    # Reductions

    def allreduce(self, tensors: list[Tensor], opts: Any = None, name: str = "all_reduce") -> Operation:
        how = _reduction(opts)
        if tensors[0].layout == torch.sparse_coo and tensors[0].is_cpu:
            return self._begin(name, self._steps.all_reduce_sparse(tensors[0], how), tensors, tensors)
        return self._start(name, lambda tensors, _: self._steps.all_reduce(tensors, how), tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Operation:
        return self.allreduce(tensors, opts, "all_reduce_coalesced")

    def reduce(self, tensors: list[Tensor], opts: Any) -> Operation:
        how, root = _reduction(opts), opts.rootRank
        return self._start("reduce", lambda tensors, _: self._steps.reduce(tensors[0], how, root), tensors, peer=root)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Operation:
        return self.reduce_scatter_single_coalesced(outputs, inputs[0], opts, "reduce_scatter")

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Operation:
        return self.reduce_scatter_single_coalesced([output], [input], opts, "reduce_scatter_single")

    def reduce_scatter_single_coalesced(
        self,
        outputs: list[Tensor],
        inputs: list[Tensor],
        opts: Any = None,
        name: str = "reduce_scatter_single_coalesced",
    ) -> Operation:
        return self._start(name, partial(self._steps.reduce_scatter, how=_reduction(opts)), inputs, outputs)

    # Data movement

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Operation:
        root = opts.rootRank
        return self._start("broadcast", lambda tensors, _: self._steps.broadcast(tensors[0], root), tensors, peer=root)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Operation:
        return self._start("all_gather", self._steps.all_gather, inputs, outputs[0])

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Operation:
        return self._start("all_gather_coalesced", self._steps.all_gather, inputs, list(chain(*outputs)))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Operation:
        return self.all_gather_single_coalesced([output], [input], opts, "all_gather_single")

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None, name: str = "all_gather_single_coalesced"
    ) -> Operation:
        return self._start(name, self._steps.all_gather, inputs, outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Operation:
        steps = partial(self._steps.gather, root=opts.rootRank)
        return self._start("gather", steps, inputs, outputs[0] if outputs else [], opts.rootRank)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Operation:
        steps = partial(self._steps.scatter, root=opts.rootRank)
        return self._start("scatter", steps, inputs[0] if inputs else [], outputs, opts.rootRank)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Operation:
        return self._start("all_to_all", self._steps.all_to_all, inputs, outputs)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], opts: Any = None
    ) -> Operation:
        steps = partial(self._steps.all_to_all_single, output_splits=output_splits, input_splits=input_splits)
        return self._start("all_to_all_single", steps, [input], [output], detail=(input_splits, output_splits))

    # Point to point

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Operation:
        return self._start("send", lambda sent, _: self._steps.send(sent[0], peer, tag), tensors, [], peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Operation:
        return self._receive("recv", tensors, peer, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> Operation:
        return self._receive("recvAnySource", tensors, -1, tag)

    recvAnysource = recv_anysource  # the name in class Backend

    def _receive(self, name: str, tensors: list[Tensor], peer: int, tag: int) -> Operation:
        source = MPI.ANY_SOURCE if peer < 0 else peer
        return self._start(name, lambda _, received: self._steps.recv(received[0], source, tag), [], tensors, peer, tag)

    def barrier(self, opts: Any = None) -> Operation:
        return self._begin("barrier", self._steps.barrier(), [], [])

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Barrier in which rank 0 reports the ranks that do not arrive within ``timeout``.

        Raises:
            RuntimeError: on rank 0 if a rank does not arrive; on the other ranks if rank 0 does not answer.
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
        return self._begin("monitored_barrier", self._steps.token(call, peer), [], [], peer)

    # The names before torch 2.13
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _after(previous: Operation, steps: Steps) -> Steps:
    """Start ``steps`` when ``previous`` has ended, with or without an error."""
    yield previous.advance
    yield from steps


def _reduction(opts: Any) -> Reduction:
    return reduction(ReduceOp(ReduceOp.SUM) if opts is None else opts.reduceOp)


def _detach(tensor: Tensor) -> Tensor:
    """Detach a dense CPU tensor from autograd.

    Raises:
        ValueError: if the tensor has another layout or device.
    """
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise ValueError(f"the mpi backend supports dense CPU and CUDA tensors, not {tensor.layout} on {tensor.device}")
    return tensor.detach() if tensor.requires_grad else tensor


def _detached(tensors: list[Tensor]) -> list[Tensor]:
    return [_detach(tensor) for tensor in tensors]
