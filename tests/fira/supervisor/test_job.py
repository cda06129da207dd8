"""The command of a job, its output, and its end without a process left. A shell replaces the launcher."""

import subprocess
import sys
import time

import pytest

from fira.errors import UserError
from fira.supervisor.job import Job, launch_command, launcher_words, processes
from tests.launch import ROOT


def test_commands_of_the_launchers():
    program = ["python", "train.py"]
    placement = {"node1": 4, "node2": 2}
    assert launch_command(["mpirun"], 6, None, program) == ["mpirun", "-n", "6", *program]
    hosts = ["--host", "node1:4,node2:2"]
    assert launch_command(["mpirun", "--x"], 6, placement, program) == ["mpirun", "--x", *hosts, "-n", "6", *program]
    hosts = ["--nodes", "2", "--nodelist", "node1,node2"]
    assert launch_command(["/usr/bin/srun"], 6, placement, program) == [
        *("/usr/bin/srun", "--ntasks", "6"),
        *hosts,
        *program,
    ]


def test_the_given_launcher_is_used_and_a_missing_one_is_named():
    assert launcher_words("mpirun --oversubscribe") == ["mpirun", "--oversubscribe"]
    for invalid in (" ", "mpirun 'x"):
        with pytest.raises(UserError, match="give a program and its flags"):
            launcher_words(invalid)
    with pytest.raises(UserError, match="no-such-launcher: No such file"):
        Job(["no-such-launcher", "-n", "1"], {})


def test_the_launcher_of_slurm_is_used_in_its_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    assert launcher_words(None)[0] == "srun"
    assert launcher_words(None)[-1] in ("--mpi=pmi2", "--mpi=pmix")


def test_output_is_passed_on_and_kept(capfd: pytest.CaptureFixture[str]):
    job = Job(["sh", "-c", "echo to $TARGET; echo to stderr >&2; exit 3"], {"TARGET": "stdout"})
    assert job.wait(10) == 3
    job.stop()
    assert capfd.readouterr() == ("to stdout\n", "to stderr\n")
    assert sorted(job.output().splitlines()) == ["to stderr", "to stdout"]


def test_no_process_is_left_after_stop(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A launcher and a rank in a session of its own, which both ignore SIGINT, are killed.

    What they print meanwhile is not shown.
    """
    monkeypatch.setattr("fira.supervisor.job.STOP_S", 0.5)
    rank = "import signal, time; signal.signal(2, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    job = Job(
        ["sh", "-c", f'trap "echo caught" INT; setsid {sys.executable} -c "{rank}" & wait; wait; wait; sleep 60'], {}
    )
    deadline = time.monotonic() + 20
    while "ready" not in job.output() and time.monotonic() < deadline:
        assert job.wait(0.05) is None
    assert len(processes(job.name)) == 2
    job.stop()
    assert processes(job.name) == []
    assert capfd.readouterr().out == "ready\n"


def test_the_launcher_receives_sigterm_when_the_supervisor_is_killed(tmp_path):
    started, ended = tmp_path / "started", tmp_path / "ended"
    launcher = f"trap 'touch {ended}; exit' TERM; touch {started}; while :; do sleep 0.05; done"
    program = f"import time; from fira.supervisor.job import Job; Job(['sh', '-c', {launcher!r}], {{}}); time.sleep(60)"
    supervisor = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        for file in (started, ended):
            deadline = time.monotonic() + 30
            while not file.exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            supervisor.kill()
    finally:
        supervisor.kill()
        supervisor.wait()
