"""Every launcher that is installed trains the same weights on two ranks, and leaves no process behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.mpi.launchers import without_launcher
from tests.launch import ROOT, inherited, is_mpich, members, mpirun

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_mpich(), reason="torch's launchers need MPICH")]

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port={port}"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--num_processes=2"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port={port}"),
    ],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_port={port}"],
}
NAMES = {"torchrun": "torch", "accelerate": "accelerate", "deepspeed": "deepspeed"}
CONFIG = '{"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 1}}'
FLAGS = [
    *("--model=fira-tiny", "--model-set=d_model=32,num_layers=2", "--vocab-size=300", "--seq-len=32", "--steps=2"),
    *("--plan=none", "--threads=1", "--eval-sequences=2", "--device=cpu"),
]


TWO_RANKS = ["--batch-size=8", "--micro-batch-size=2", "--pp=1", "--shard=optimizer"]


def train(command: list[str], out: Path, *flags: str, env: dict[str, str] | None = None) -> list[list[str]]:
    """Return the columns of the log that do not depend on the time. env: further environment variables."""
    with tempfile.TemporaryFile("w+") as output:
        job = subprocess.Popen(
            [*command, str(ROOT / "tests/ranks/train.py"), *FLAGS, *flags, f"--out={out}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=without_launcher(inherited()) | {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"} | (env or {}),
            cwd=out.parent,
            start_new_session=True,
        )
        try:
            status = job.wait(150)
            time.sleep(1)
            left = members(job.pid)
        finally:
            for pid in members(job.pid):
                os.kill(pid, signal.SIGKILL)
            job.wait()
        output.seek(0)
        assert (status, left) == (0, []), output.read()
    return [line.split(",")[:4] for line in (out / "training_log.csv").read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The log of two ranks of mpirun, with the flags instead of the file."""
    log = train([mpirun(), "-np", "2", sys.executable], tmp_path_factory.mktemp("run") / "mpirun", *TWO_RANKS)
    assert len(log) == 4  # the columns, the validation before the first step, and two steps
    return log


@pytest.mark.parametrize("name", LAUNCHERS)
def test_training_does_not_depend_on_the_launcher(name: str, expected: list[list[str]], tmp_path: Path):
    if find_spec(NAMES[name]) is None:
        pytest.skip(f"{name} is not installed")
    (tmp_path / "ds_config.json").write_text(CONFIG)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *(word.format(port=port) for word in LAUNCHERS[name])]
    assert train(command, tmp_path / name, "--deepspeed=ds_config.json") == expected


@pytest.mark.skipif(shutil.which("srun") is None or "SLURM_CONF" not in os.environ, reason="needs Slurm, SLURM_CONF")
def test_training_by_srun(expected: list[list[str]], tmp_path: Path):
    command = ["srun", "-n2", "--overcommit", "--mpi=pmi2", sys.executable]
    assert train(command, tmp_path / "srun", *TWO_RANKS) == expected


@pytest.mark.skipif("I_MPI_ROOT" not in os.environ, reason="needs Intel MPI, I_MPI_ROOT")
def test_training_by_intel_mpi(expected: list[list[str]], tmp_path: Path):
    """With its own mpirun and with torchrun, which MPI connects by PMI 1."""
    root = Path(os.environ["I_MPI_ROOT"])
    env = {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "MPI4PY_LIBMPI": str(root / "lib")}
    probe = [root / "bin/mpirun", "-np", "1", sys.executable, "-m", "pipeline.mpi.probe"]
    assert "Intel(R) MPI" in subprocess.check_output(probe, env=inherited() | env, text=True, timeout=60)
    assert train(["mpirun", "-np", "2", sys.executable], tmp_path / "mpirun", *TWO_RANKS, env=env) == expected
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    assert train(command, tmp_path / "torchrun", *TWO_RANKS, env=env) == expected
