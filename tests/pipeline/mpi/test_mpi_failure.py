"""``pipeline.fail``: one message, one status, whoever fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, run_ranks

SCRIPT = """
import sys
import torch.distributed as dist
import pipeline
world = pipeline.init()
if sys.argv[1] == "all" or world.rank == 1:
    pipeline.fail(f"bad flag, says rank {world.rank}", 2)
dist.barrier()
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


@pytest.mark.parametrize(("who", "speaker"), [("all", 0), ("one", 1)])
def test_the_message_is_printed_once(script: Path, who: str, speaker: int) -> None:
    result = run_ranks(3, script, who)
    assert result.returncode == 2
    first, *rest = result.stderr.strip().splitlines()
    assert first == f"bad flag, says rank {speaker}"
    assert not rest or set(rest[0]) == {"-"}, result.stderr  # Open MPI's mpirun adds a box of its own
    assert not result.stdout.strip()


def test_a_rank_that_fails_inside_init_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "early.py").write_text(EARLY)
    result = run_ranks(2, tmp_path / "early.py")
    assert result.returncode == 1
    assert result.stderr.count("ModuleNotFoundError: import of torch halted") == 1


def test_without_init_it_ends_the_process() -> None:
    command = [sys.executable, "-c", "import pipeline; pipeline.fail('no such file', 2)"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (result.returncode, result.stderr) == (2, "no such file\n")


@pytest.mark.parametrize(
    ("launcher", "size", "rank"),
    [("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")],
)
def test_a_launcher_that_does_not_know_the_library_is_named(script: Path, launcher: str, size: str, rank: str) -> None:
    """Its ranks find themselves alone, but their environment says how many were started."""
    alone = {size: "4", rank: "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "all"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | alone)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{launcher} started 4 ranks but MPI sees one")
