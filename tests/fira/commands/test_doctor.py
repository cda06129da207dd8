"""The command `fira doctor` with and without mpirun: output, exit status and errors."""

import subprocess
import sys
from pathlib import Path

import pytest

from fira.commands.doctor import train_program
from pipeline.schedule import SCHEDULES
from tests.launch import ROOT, inherited, run_ranks

SCRIPT = ROOT / "scripts" / "doctor.py"


def doctor(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = inherited() | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False)


def test_screen_of_this_machine():
    done = doctor()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("fira can train on this machine")
    assert "\x1b" not in done.stdout


def test_a_problem_that_makes_training_impossible_has_status_1(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = doctor(FIRA_CACHE=str(tmp_path / "file" / "cache"))
    assert done.returncode == 1
    assert "FATAL" in done.stdout
    assert done.stdout.endswith("fira cannot train on this machine; resolve the lines marked FATAL\n")


@pytest.mark.slow
def test_two_ranks_measure_links_and_compare_schedules(tmp_path: Path):
    done = run_ranks(2, SCRIPT, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fira can train on this machine") == 1
    assert "ranks             OK       2, of which 2 on this machine" in done.stdout
    assert "links between ranks: cpu tensors over mpi" in done.stdout
    rows = done.stdout.splitlines()[-len(SCHEDULES) - 1 :]
    assert [row.split()[0] for row in rows] == [*SCHEDULES, "1f1b"]
    assert all(" OK " in row for row in rows)


@pytest.mark.slow
def test_two_ranks_end_with_status_1_on_an_unusable_machine(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = run_ranks(2, SCRIPT, timeout=100, env={"FIRA_CACHE": str(tmp_path / "file" / "cache")})
    assert done.returncode == 1
    assert "links between ranks" not in done.stdout


def test_gpu_checks_without_gpu_or_with_mpirun_end_with_status_2():
    done = doctor("--gpu", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "sees no GPU" in done.stderr
    done = run_ranks(2, SCRIPT, "--gpu")
    assert (done.returncode, done.stderr) == (2, "--gpu starts ranks itself; start it without mpirun\n")


def test_training_is_started_like_the_doctor(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/doctor.py"])
    assert train_program() == (sys.executable, str(Path("scripts/train.py").resolve()))
    monkeypatch.setattr(sys, "argv", ["/opt/bin/fira", "doctor"])
    assert train_program() == (sys.executable, "/opt/bin/fira", "train")
