"""Programs with a time limit, and the processes that they leave behind."""

import os
import sys
import time
from pathlib import Path

from fira.doctor import limited_process
from fira.doctor.limited_process import run_limited
from pipeline.mpi.launchers import without_launcher

START_CHILD = "import subprocess, sys; child = subprocess.Popen(['sleep', '60']{}); print(child.pid, flush=True){}"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_status_and_output_of_a_program():
    outcome = run_limited(
        [sys.executable, "-c", "import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)"], 60
    )
    assert (outcome.status, sorted(outcome.output.split()), outcome.left) == (3, ["a", "b"], 0)
    assert outcome.last_lines(1) in "ab"


def test_a_program_that_hangs_is_stopped_with_its_children():
    started = time.monotonic()
    outcome = run_limited([sys.executable, "-c", START_CHILD.format("", "; child.wait()")], 3)
    assert outcome.status is None
    assert 3 <= outcome.seconds <= time.monotonic() - started < 30
    assert not is_running(int(outcome.output))


def test_a_process_left_behind_in_another_group_is_counted_and_ended(monkeypatch):
    monkeypatch.setattr(limited_process, "EXIT_S", 0.3)
    outcome = run_limited([sys.executable, "-c", START_CHILD.format(", process_group=0", "")], 60)
    assert (outcome.status, outcome.left) == (0, 1)
    assert not is_running(int(outcome.output))


def test_variables_of_a_launcher_are_removed_and_those_of_the_user_kept(monkeypatch):
    launcher = {"PMI_RANK": "1", "PMIX_NAMESPACE": "x", "OMPI_COMM_WORLD_SIZE": "2", "SLURM_PROCID": "1"}
    user = {"PATH": "/bin", "OMPI_ALLOW_RUN_AS_ROOT": "1", "CUDA_VISIBLE_DEVICES": "0"}
    assert without_launcher(launcher | user) == user
    monkeypatch.setenv("PMI_RANK", "1")
    outcome = run_limited([sys.executable, "-c", "import os; print(os.environ.get('PMI_RANK'))"], 60)
    assert outcome.output == "None\n"
    assert os.environ["PMI_RANK"] == "1"
