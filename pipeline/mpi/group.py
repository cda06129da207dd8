# mypy: disable-error-code="override, assignment, misc"
"""Process groups of ``torch.distributed`` over MPI communicators, and their registration as the backend "mpi"."""

import functools
import math
import sys
import zlib
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch._C._distributed_c10d import Backend
from torch.distributed import ProcessGroup, distributed_c10d

from pipeline.mpi.buffers import EMPTY
from pipeline.mpi.operations import Operations
from pipeline.mpi.rank_watch import Watch
from pipeline.mpi.store import MPIStore
from pipeline.mpi.trace import GroupTrace
from pipeline.mpi.work import Operation, ProgressEngine, Steps

SUPPORTS_PYTHON_BACKENDS = torch.__version__ >= "2.14"  # a backend for one device type of a group, in Python


def start(comm: MPI.Intracomm, progress: ProgressEngine, watch: Watch, cuda: str | None, cuda_aware: bool) -> None:
    """Create the default process group of ``torch.distributed`` over ``comm``.

    PyTorch recognizes the backend name "mpi", but its wheels lack the class ``ProcessGroupMPI``. A ``GroupFactory``
    takes its place, so that ``new_group``, ``DeviceMesh`` and all other functions create MPI groups.

    Args:
        comm: a communicator of all ranks.
        progress: engine that advances the operations of all groups.
        watch: this rank's watch, whose timeout applies.
        cuda: backend for CUDA tensors; None without CUDA.
        cuda_aware: whether MPI may access device memory.
    """
    groups = GroupFactory(comm, progress, watch, cuda_aware)
    distributed_c10d.ProcessGroupMPI = groups
    distributed_c10d._MPI_AVAILABLE = True
    dist.init_process_group(
        # With plain "mpi", PyTorch would ignore the store. Up to torch 2.13 the MPI group handles CUDA tensors as well.
        f"cpu:mpi,cuda:{cuda}" if cuda and SUPPORTS_PYTHON_BACKENDS else "cpu:mpi",
        store=groups.store,
        rank=comm.Get_rank(),
        world_size=comm.Get_size(),
        timeout=timedelta(seconds=watch.timeout_s),
    )


class GroupFactory:
    """Factory of process groups. PyTorch calls ``create`` on the members of a group only, with equal arguments."""

    def __init__(self, world: MPI.Intracomm, progress: ProgressEngine, watch: Watch, cuda_aware: bool) -> None:
        self._progress = progress
        self._cuda_aware = cuda_aware
        self._world = world
        self._arrivals = world.Dup()
        self._watch = watch
        self._creations: dict[tuple[int, ...], GroupTrace] = {}
        self.store = MPIStore(world, watch.timeout_s)  # referenced here, because torch keeps only its C++ part alive

    def create(self, ranks: list[int]) -> Operations:
        """Create a group of these global ranks; of all ranks if the list is empty."""
        arguments = _arguments_of_new_group()
        ranks = ranks or list(range(self._world.Get_size()))
        mixed = SUPPORTS_PYTHON_BACKENDS and _mixed(arguments.get("backend_config"))
        kind = functools.partial(MPIBackend, self) if mixed else MPIProcessGroup
        return self.make(
            kind, ranks, arguments.get("timeout"), arguments.get("group_name", ""), arguments.get("group_desc")
        )

    def make(
        self,
        kind: Callable[..., Operations],
        ranks: list[int],
        timeout: timedelta | None,
        name: str,
        description: str | None,
    ) -> Operations:
        """Create a group. Collective over ``ranks``.

        Args:
            kind: called with the arguments of ``Operations``.
            ranks: global ranks of the members.
            timeout: limit of the group's operations; None for the timeout of the job.
            name: name of the group in reports.
            description: ``group_desc`` of ``new_group``.
        """
        tag = zlib.crc32(repr(ranks).encode()) % 32768  # separates groups that several threads create concurrently
        entry = self._creations.setdefault(tuple(ranks), self._watch.group(ranks)).begin("new_group", [])
        Operation(entry, self._progress, self._arrival(ranks, tag), [], [], math.inf).wait()
        comm = self._world.Create_group(self._world.Get_group().Incl(ranks), tag)
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        given = timeout not in (None, distributed_c10d.default_pg_timeout, timedelta(seconds=self._watch.timeout_s))
        limit_s = timeout.total_seconds() if timeout and given else math.inf
        group = kind(comm, self._progress, self._watch.group(ranks), limit_s, self._cuda_aware)
        group.set_names(name, description)
        return group

    def _arrival(self, ranks: list[int], tag: int) -> Steps:
        """The steps that end when all ``ranks`` have begun them.

        ``Create_group`` spins while it waits, which would take a core from the ranks that it waits for.
        """
        comm, (first, *others) = self._arrivals, ranks
        peers = others if comm.Get_rank() == first else [first]
        for start in (comm.Irecv, comm.Isend) if comm.Get_rank() == first else (comm.Isend, comm.Irecv):
            yield [start(EMPTY, peer, tag) for peer in peers]


def _arguments_of_new_group() -> dict[str, Any]:
    """Return the arguments of ``new_group`` from PyTorch's stack frame, because PyTorch passes on the ranks only."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "_new_process_group_helper":
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


def _mixed(config: Any) -> bool:
    """Return whether the requested group uses another backend for another device type."""
    return config is not None and set(config.get_device_backend_map().values()) != {"mpi"}


class MPIProcessGroup(Operations, ProcessGroup):
    """Process group for all device types. C++ code looks up its getters and setters by name."""

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
        self.set_names(self._trace.name, description)
        super()._set_group_desc(description)

    def _get_backend(self, device: torch.device) -> "MPIProcessGroup":
        return self


class MPIBackend(Operations, Backend):
    """Backend for one device type of a group such as ``cpu:mpi,cuda:nccl``, from torch 2.14 on.

    PyTorch exposes only ``wait`` and ``get_future`` of its operations, so ``MPIProcessGroup`` is used where possible.
    """

    def __init__(self, factory: GroupFactory, *args: Any) -> None:
        super().__init__(*args)
        self._factory = factory

    @property
    def options(self) -> Backend.Options:
        return Backend.Options("mpi")

    @property
    def supports_splitting(self) -> bool:
        return True

    def split(self, store: dist.Store, ranks: list[int], opts: Backend.Options) -> Operations:
        """Create a subgroup that contains this rank, for ``split_group`` from torch 2.15 on.

        Raises:
            RuntimeError: if this rank is in no subgroup, which would crash PyTorch.
        """
        if self._rank not in ranks:
            raise RuntimeError("split_group requires every rank to be in a subgroup; use new_group to leave ranks out")
        members = [self._trace.ranks[rank] for rank in ranks]
        kind = functools.partial(MPIBackend, self._factory)
        return self._factory.make(kind, members, opts._timeout, opts.group_name, None)

    def monitoredBarrier(self, opts: Any, wait_all_ranks: bool = False) -> None:
        self.monitored_barrier(opts.timeout, wait_all_ranks)
