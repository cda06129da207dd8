"""Recognition of the program that started a rank, by the variables that each launcher sets."""

import os

import pytest

from pipeline.mpi.launchers import launched_rank, launched_size, launcher, without_launcher

RENDEZVOUS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none", **RENDEZVOUS}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "CROSS_SIZE": "1", **RENDEZVOUS}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "2", "PMI_FD": "6"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "7"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("variables", "name", "rank", "size"),
    [
        ({}, None, None, 1),
        (TORCHRUN, "torchrun", 5, 16),
        (DEEPSPEED, "the launcher", 3, 4),
        (MPICH, "mpirun", 2, 4),
        (OPEN_MPI, "mpirun", 7, 8),
        (SRUN, "srun", 1, 2),
        (SRUN | TORCHRUN, "torchrun", 5, 16),  # srun torchrun …
        (SRUN | MPICH, "mpirun", 2, 4),  # mpirun in a job, or srun --mpi=pmi2
        (OPEN_MPI | DEEPSPEED, "mpirun", 7, 8),  # deepspeed --launcher openmpi …
        (DEEPSPEED | {"WORLD_SIZE": "four"}, None, None, 1),
        ({"RANK": "3", "WORLD_SIZE": "4"}, None, None, 1),  # set for another purpose
        (TORCHRUN | {"WORLD_SIZE": "1"}, None, None, 1),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None, None, 1),  # salloc or sbatch
    ],
)
def test_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str | None, rank: int | None, size: int
) -> None:
    for variable in os.environ.keys() - without_launcher(os.environ).keys():
        monkeypatch.delenv(variable)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    found = launcher()
    assert (found and found.name, launched_rank(), launched_size()) == (name, rank, size)


def test_a_child_process_does_not_inherit_the_launcher() -> None:
    user = {"PATH": "/bin", "OMP_NUM_THREADS": "2", "RANKED": "1"}
    assert without_launcher({**TORCHRUN, **DEEPSPEED, **MPICH, **OPEN_MPI, **SRUN, **user}) == {
        "CROSS_SIZE": "1",
        **user,
    }
