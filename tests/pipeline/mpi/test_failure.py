"""``pipeline.fail`` and ``abort_on_failure``: one message and one status, whichever ranks fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, inherited, run_ranks

SCRIPT = """
import sys
import torch.distributed as dist
import pipeline
world = pipeline.init()
if sys.argv[1] == "all" or world.rank == 1:
    pipeline.fail(f"bad flag on rank {world.rank}", 2)
dist.barrier()
"""

EXIT = """
import sys
import pipeline
with pipeline.abort_on_failure():
    pipeline.init()
    sys.exit("no such file")
"""

EARLY = """
import os, sys
if (os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]) == "1":
    sys.modules["torch"] = None
import pipeline
pipeline.init()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(("failing", "reporter"), [("all", 0), ("one", 1)])
def test_message_is_printed_once(script: Path, failing: str, reporter: int) -> None:
    result = run_ranks(3, script, failing)
    assert result.returncode == 2
    first, *rest = result.stderr.strip().splitlines()
    assert first == f"bad flag on rank {reporter}"
    assert not rest or set(rest[0]) == {"-"}, result.stderr  # Open MPI's mpirun adds its own message
    assert not result.stdout.strip()


def test_failure_inside_init_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "early.py").write_text(EARLY)
    result = run_ranks(2, tmp_path / "early.py")
    assert result.returncode == 1
    assert result.stderr.count("ModuleNotFoundError: import of torch halted") == 1


def test_exit_message_is_printed_once(tmp_path: Path) -> None:
    (tmp_path / "exit.py").write_text(EXIT)
    result = run_ranks(3, tmp_path / "exit.py")
    assert result.returncode == 1
    assert result.stderr.count("no such file") == 1


def test_deprecated_environment_variable_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "start.py").write_text("import pipeline; pipeline.init()")
    result = run_ranks(3, tmp_path / "start.py", env={"FIRA_TIMEOUT_S": "abc"})
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert lines.count("pipeline: deprecated environment variables: FIRA_TIMEOUT_S (use PIPELINE_MPI_TIMEOUT_S)") == 1
    assert lines.count("PIPELINE_MPI_TIMEOUT_S must be a positive number of seconds, not abc") == 1


def test_fail_without_init_ends_the_process() -> None:
    command = [sys.executable, "-c", "import pipeline; pipeline.fail('no such file', 2)"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (result.returncode, result.stderr) == (2, "no such file\n")


@pytest.mark.parametrize(
    ("launcher", "size", "rank"),
    [("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")],
)
def test_unsupported_launcher_is_reported(script: Path, launcher: str, size: str, rank: str) -> None:
    """MPI finds one rank, but the environment contains the number of started ranks."""
    alone = {size: "4", rank: "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "all"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | alone)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{launcher} started 4 ranks but MPI sees one")


def test_exit_of_a_program_without_mpirun_is_not_reported() -> None:
    command = [sys.executable, "-c", "import sys, pipeline; pipeline.init(); sys.exit(3)"]
    result = subprocess.run(command, cwd=ROOT, env=inherited(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (3, "")
