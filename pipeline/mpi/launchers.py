"""Programs that start the ranks of a job, recognised by the environment variables that they set.

| started by | MPI connects the ranks by |
|---|---|
| `mpirun` or `mpiexec` of MPICH and Intel MPI, also under PBS and in the launcher of Kubernetes' MPIJob | its own PMI |
| `mpirun` of Open MPI, likewise | its own PMIx |
| `srun --mpi=pmi2` (MPICH) or `srun --mpi=pmix` (Open MPI) | Slurm's PMI |
| `torchrun`, `deepspeed`, `accelerate launch`, Kubernetes' PyTorchJob | torch's store, see ``process_manager.py`` |
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

_MPIRUN = "mpirun and the MPI library do not belong together; use the mpirun of that library (`which -a mpirun`)"
_TORCH = "the ranks of this launcher need MPICH (pip install mpich) or Intel MPI; with other MPI libraries use mpirun"


@dataclass(frozen=True)
class Launcher:
    """A launcher and the environment variables of its ranks.

    needed: variables that tell it from others. size, rank: number of ranks, and rank of a process. is_mpi: whether MPI
    finds the other ranks by itself. advice: what to do if it nevertheless finds one rank only.
    """

    name: str
    size: str
    rank: str
    advice: str
    needed: tuple[str, ...] = ()
    is_mpi: bool = True


_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
_LAUNCHERS = (  # The first whose variables are set has started this process; torchrun under srun is torchrun.
    Launcher("torchrun", "WORLD_SIZE", "RANK", _TORCH, ("TORCHELASTIC_RUN_ID", *_RENDEZVOUS), is_mpi=False),
    Launcher("mpirun", "PMI_SIZE", "PMI_RANK", _MPIRUN),
    Launcher("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", _MPIRUN),
    Launcher("the launcher", "WORLD_SIZE", "RANK", _TORCH, _RENDEZVOUS, is_mpi=False),
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "use srun --mpi=pmi2 for MPICH, --mpi=pmix for Open MPI"),
)

# Variables that a launcher sets for its ranks. A program that inherits them would join the launcher's job.
_MPI_PREFIXES = (
    *("PMI_", "PMIX_", "PALS_", "HYDI_", "HYDRA_", "MPI_LOCAL", "PRTE_", "SLURM_", "OPAL_"),
    *("OMPI_COMM_WORLD_", "OMPI_WORLD_", "OMPI_UNIVERSE_SIZE", "OMPI_MCA_num_procs", "OMPI_FILE_LOCATION"),
)
_TORCH_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", *_RENDEZVOUS)


def launcher() -> Launcher | None:
    """Return what has started this process as one of several ranks; None if it is the only one.

    A launcher sets all its variables; an empty one counts as not set. Ends the process with one line and exit status 2
    if one of them is invalid, because each rank would otherwise train on its own, or wait for others.
    """
    for candidate in _LAUNCHERS:
        if not all(os.environ.get(name) for name in (candidate.size, candidate.rank, *candidate.needed)):
            continue
        size = _number(candidate, candidate.size, 1)
        if size > 1:
            _number(candidate, candidate.rank, 0, size - 1)
            if not candidate.is_mpi:
                _number(candidate, "MASTER_PORT", 1, 2**16 - 1)
            return candidate
    return None


def _number(candidate: Launcher, name: str, least: int, most: int = 10**9 - 1) -> int:
    """Return the value of a variable, which must be an integer from `least` to `most`."""
    value = os.environ[name]
    if not re.fullmatch("[0-9]{1,9}", value) or not least <= int(value) <= most:
        problem = f"environment variable {name} is {value!r}, not an integer from {least:,} to {most:,}"
        remedy = f"correct it where the ranks are started, or unset {candidate.size} to run one rank"
        print(f"{problem}; {remedy}", file=sys.stderr)
        raise SystemExit(2)
    return int(value)


def launched_rank() -> int | None:
    """Return this process's rank if a launcher started several. Unlike ``init()``, this loads neither MPI nor torch."""
    found = launcher()
    return int(os.environ[found.rank]) if found else None


def launched_size() -> int:
    """Return the number of ranks that the launcher started; 1 without a launcher."""
    found = launcher()
    return int(os.environ[found.size]) if found else 1


def without_launcher(variables: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that a launcher sets for its ranks."""
    return {
        name: value
        for name, value in variables.items()
        if not name.startswith((*_MPI_PREFIXES, "TORCHELASTIC_")) and name not in _TORCH_NAMES
    }
