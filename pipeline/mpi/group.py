# mypy: disable-error-code="override, assignment, misc"
"""Process groups: what ``torch.distributed`` makes of a communicator, and how it comes to make ours."""

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

from pipeline.mpi.operations import Operations
from pipeline.mpi.store import MPIStore
from pipeline.mpi.trace import GroupTrace
from pipeline.mpi.watch import Watch
from pipeline.mpi.work import ProgressEngine

TAKES_BACKENDS = torch.__version__ >= "2.14"  # made in Python, for one device of a group


def start(comm: MPI.Intracomm, progress: ProgressEngine, watch: Watch, cuda: str | None, cuda_aware: bool) -> None:
    """Make ``comm`` the default process group of ``torch.distributed``: "mpi" for the CPU, ``cuda`` for CUDA.

    PyTorch knows the name "mpi", but its wheels are built without the class behind it. Ours takes that place, so
    ``new_group``, ``DeviceMesh`` and everything else make MPI groups by PyTorch's own path.
    """
    groups = GroupFactory(comm, progress, watch, cuda_aware)
    distributed_c10d.ProcessGroupMPI = groups
    distributed_c10d._MPI_AVAILABLE = True
    dist.init_process_group(
        # by device: for plain "mpi" PyTorch would ignore the store. Up to 2.13 our group takes CUDA's tensors, too
        f"cpu:mpi,cuda:{cuda}" if cuda and TAKES_BACKENDS else "cpu:mpi",
        store=groups.store,
        rank=comm.Get_rank(),
        world_size=comm.Get_size(),
        timeout=timedelta(seconds=watch.timeout_s),
    )


class GroupFactory:
    """Makes groups of the world's ranks. PyTorch calls ``create`` on a group's members only, with the same ranks."""

    def __init__(self, world: MPI.Intracomm, progress: ProgressEngine, watch: Watch, cuda_aware: bool) -> None:
        self._progress = progress
        self._cuda_aware = cuda_aware
        self._world = world
        self._watch = watch
        self._creations: dict[tuple[int, ...], GroupTrace] = {}
        self.store = MPIStore(world, watch.timeout_s)  # torch keeps but its C++ half alive

    def create(self, ranks: list[int]) -> Operations:
        """A group of these ranks, or of all."""
        asked = _asked_for()
        ranks = ranks or list(range(self._world.Get_size()))
        mixed = TAKES_BACKENDS and _mixed(asked.get("backend_config"))
        kind = functools.partial(MPIBackend, self) if mixed else MPIProcessGroup
        return self.make(kind, ranks, asked.get("timeout"), asked.get("group_name", ""), asked.get("group_desc"))

    def make(
        self,
        kind: Callable[..., Operations],
        ranks: list[int],
        timeout: timedelta | None,
        name: str,
        description: str | None,
    ) -> Operations:
        """A group with a name. Collective over ``ranks``."""
        tag = zlib.crc32(repr(ranks).encode()) % 32768  # groups made at the same time by several threads stay apart
        entry = self._creations.setdefault(tuple(ranks), self._watch.group(ranks)).begin("new_group", [])
        with entry:
            comm = self._world.Create_group(self._world.Get_group().Incl(ranks), tag)
        entry.end(None)
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        given = timeout not in (None, distributed_c10d.default_pg_timeout, timedelta(seconds=self._watch.timeout_s))
        limit_s = timeout.total_seconds() if timeout and given else math.inf
        group = kind(comm, self._progress, self._watch.group(ranks), limit_s, self._cuda_aware)
        group.called(name, description)
        return group


def _asked_for() -> dict[str, Any]:
    """What ``new_group`` was asked for: PyTorch passes on no more than the ranks, but the rest stands in its frame."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "_new_process_group_helper":
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


def _mixed(config: Any) -> bool:
    """Does another backend serve other devices of the group that is asked for?"""
    return config is not None and set(config.get_device_backend_map().values()) != {"mpi"}


class MPIProcessGroup(Operations, ProcessGroup):
    """A whole group, for every device. Getters and setters are looked up by name from C++."""

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
        self.called(self._trace.name, description)
        super()._set_group_desc(description)

    def _get_backend(self, device: torch.device) -> "MPIProcessGroup":
        return self


class MPIBackend(Operations, Backend):
    """What a group has for one of its devices, as in ``cpu:mpi,cuda:nccl``, from torch 2.14 on.

    Of its operations PyTorch passes on ``wait`` and ``get_future`` only, so it is not what all groups are made of.
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
        """For ``split_group``, from torch 2.15 on: the group of some of this group's ranks that this one is in.

        Raises:
            RuntimeError: it is in none; PyTorch would crash there.
        """
        if self._rank not in ranks:
            raise RuntimeError("split_group needs every rank to be in one of the parts; new_group leaves ranks out")
        members = [self._trace.ranks[rank] for rank in ranks]
        kind = functools.partial(MPIBackend, self._factory)
        return self._factory.make(kind, members, opts._timeout, opts.group_name, None)

    def monitoredBarrier(self, opts: Any, wait_all_ranks: bool = False) -> None:
        self.monitored_barrier(opts.timeout, wait_all_ranks)
