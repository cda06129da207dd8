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
PBS = {"PBS_ENVIRONMENT": "PBS_BATCH", "PBS_NODEFILE": "/var/spool/pbs/aux/7", "PBS_NODENUM": "0", "PBS_TASKNUM": "1"}
MPI_JOB = {  # set by Kubernetes' MPI operator in the pods of an MPIJob, by mpiImplementation
    "K_MPI_JOB_ROLE": "launcher",
    "HYDRA_HOST_FILE": "/etc/mpi/hostfile",  # MPICH
    "HYDRA_LAUNCH_EXTRA_ARGS": "-o ConnectionAttempts=10",
    "I_MPI_HYDRA_HOST_FILE": "/etc/mpi/hostfile",  # Intel MPI
    "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",  # Open MPI
}


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
        (PBS, None, None, 1),  # the job's script
        (PBS | MPICH, "mpirun", 2, 4),
        (PBS | OPEN_MPI, "mpirun", 7, 8),
        (MPI_JOB, None, None, 1),  # the launcher's pod before mpirun
        (MPI_JOB | MPICH, "mpirun", 2, 4),
        (MPI_JOB | OPEN_MPI, "mpirun", 7, 8),
        ({"RANK": "3", "WORLD_SIZE": "4"}, None, None, 1),  # set for another purpose
        ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node1"}, None, None, 1),
        (TORCHRUN | {"WORLD_SIZE": "1"}, None, None, 1),
        (TORCHRUN | {"WORLD_SIZE": ""}, None, None, 1),  # empty in a template of a container
        (MPICH | {"PMI_SIZE": "", "PMI_RANK": ""}, None, None, 1),
        ({"WORLD_SIZE": "1", "RANK": "x", "MASTER_ADDR": "node1"}, None, None, 1),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None, None, 1),  # salloc or sbatch
    ],
)
def test_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str | None, rank: int | None, size: int
) -> None:
    set_variables(monkeypatch, variables)
    found = launcher()
    assert (found and found.name, launched_rank(), launched_size()) == (name, rank, size)


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        (DEEPSPEED | {"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', not an integer from 1 to"),
        (TORCHRUN | {"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        (DEEPSPEED | {"RANK": "x"}, "RANK is 'x', not an integer from 0 to 3;"),
        (DEEPSPEED | {"RANK": "-1"}, "RANK is '-1'"),
        (DEEPSPEED | {"RANK": "4"}, "RANK is '4', not an integer from 0 to 3;"),
        (DEEPSPEED | {"RANK": "\u00b2"}, "RANK is '\u00b2'"),
        (DEEPSPEED | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x', not an integer from 1 to 65,535;"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        (MPICH | {"PMI_RANK": "x"}, "PMI_RANK is 'x'"),
        (MPICH | {"PMI_SIZE": "x"}, "PMI_SIZE is 'x'"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "8"}, "OMPI_COMM_WORLD_RANK is '8', not an integer from 0 to 7;"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
    ],
)
def test_invalid_variables_end_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], problem: str
) -> None:
    set_variables(monkeypatch, variables)
    with pytest.raises(SystemExit) as error:
        launcher()
    line, end = capsys.readouterr().err.split("\n")
    assert (error.value.code, end) == (2, "")
    assert line.startswith(f"environment variable {problem}")


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Set these variables, and no others of a launcher."""
    for variable in os.environ.keys() - without_launcher(os.environ).keys():
        monkeypatch.delenv(variable)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)


def test_a_child_process_does_not_inherit_the_launcher() -> None:
    user = {"PATH": "/bin", "OMP_NUM_THREADS": "2", "RANKED": "1"}
    assert without_launcher({**TORCHRUN, **DEEPSPEED, **MPICH, **OPEN_MPI, **SRUN, **user}) == {
        "CROSS_SIZE": "1",
        **user,
    }
