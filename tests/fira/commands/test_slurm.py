"""The job script of `fira slurm`: its text, and its behaviour with imitated commands of Slurm."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fira.commands import slurm
from fira.errors import UserError


def write(*flags: str) -> str:
    slurm.main(["--nodes", "2", *flags])
    return Path("train.sbatch").read_text()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fira"])


def test_flags_of_sbatch_and_of_train(capsys: pytest.CaptureFixture[str]):
    text = write("--ranks-per-node", "4", "--time", "08:00:00", "--sbatch", "--partition=gpu --account=me", "--lr=0.01")
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")] == [
        *("--job-name=fira-tiny", "--nodes=2", "--ntasks-per-node=4", "--time=08:00:00", "--signal=B:USR1@300"),
        *("--open-mode=append", "--requeue", "--partition=gpu", "--account=me"),
    ]
    assert "fira train --lr 0.01 --out runs/fira-tiny --resume auto --elastic 8 &" in lines
    assert capsys.readouterr().out.splitlines()[-1] == "next: sbatch train.sbatch"
    with pytest.raises(UserError, match="exists already"):
        slurm.main(["--nodes", "2"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "runs/a/checkpoints/step-000005", "--out", "b"], "a job continues from the newest checkpoint"),
        (["--resume", "auto"], "give its run folder as --out"),
        (["--time", "5"], "--time 5: not longer than --grace, 300 s"),
        (["--time", "0:04:59"], "not longer than --grace"),
        (["--sbatch", "'"], "close the quote"),
        (["--script", "none/x"], "there is no folder none"),
    ],
)
def test_a_job_that_could_not_continue_is_refused(flags: list[str], message: str):
    with pytest.raises(UserError, match=message):
        slurm.main(["--nodes", "1", *flags])
    assert not Path("train.sbatch").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 600), ("10:30", 630), ("1:00:05", 3605), ("2-3", 183600), ("1-0:30", 88200), ("1-0:0:1", 86401)],
)
def test_time_limits_of_slurm(text: str, seconds: int):
    assert slurm.time_limit(text) == seconds
    assert slurm.time_limit("UNLIMITED") is None


def test_each_script_has_its_own_run_folder_and_names_may_have_spaces():
    assert "--out runs/fira-tiny-2 " in write() + write("--script", "b") + Path("b").read_text()
    assert "#SBATCH '--job-name=my run'" in write("--script", "c", "--out", "my run") + Path("c").read_text()


def test_cores_reach_the_ranks():
    text = write("--cpus-per-rank", "6")
    assert "#SBATCH --cpus-per-task=6" in text
    assert 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"\n' in text


def test_the_planner_chooses_the_layout_for_given_hardware():
    text = write("--model", "fira-base", "--hardware", "h200", "--dp", "4")
    assert "#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n" in text
    assert "# pp 4 × dp 4 (ep " in text
    for flag in ("--pp 4", "--dp 4", "--micro-batch-size", "--schedule", "--elastic 16"):
        assert flag in text
    with pytest.raises(UserError, match="--hardware h900: no such device"):
        slurm.main(["--nodes", "1", "--script", "b.sbatch", "--hardware", "h900"])


@pytest.mark.parametrize(
    ("name", "finished", "requeued"), [("USR1", False, True), ("USR1", True, False), (None, False, False)]
)
def test_only_the_signal_before_the_time_limit_requeues_the_job(
    tmp_path: Path, name: str | None, finished: bool, requeued: bool
):
    write("--out", "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "bin").mkdir()
    done = "touch run/finished.json" if finished else "true"
    wait = "for _ in $(seq 50); do sleep 0.1; done"
    programs = {
        "fira": f"trap '{done}; echo saved; exit 0' TERM\ntouch started\n{wait}; exit 5",
        "scontrol": 'echo "scontrol $*"',
    }
    for program, body in programs.items():
        file = tmp_path / "bin" / program
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    script = Path("train.sbatch").read_text().replace("export PATH=", "export PATH=$PWD/bin:")
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "PATH": os.environ["PATH"]}
    job = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True, env=variables)
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if name:
        job.send_signal(signal.Signals[f"SIG{name}"])
    output, _ = job.communicate(timeout=30)
    assert (job.returncode, "saved" in output) == ((0, True) if name else (5, False))
    assert ("scontrol requeue 7" in output) == requeued
