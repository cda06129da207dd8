"""Runs of the train command that take seconds: started, killed, and compared by their losses."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fira.metrics.csv_log import read_log
from tests.launch import ROOT, inherited, mpirun, run_function, run_ranks

TRAIN = ROOT / "tests" / "ranks" / "train.py"
SETTINGS = """
model_set = "d_model=16,num_layers=4,d_ff=16,n_head=2,dropout=0.1"
vocab_size = 300
seq-len = 16
batch_size = 6
micro_batch_size = 2
steps = 20
eval_every = 10
eval_sequences = 8
save_every = 10
keep = 5
plan = "none"
"""
PP4, PP2_DP2_EP2, ONE = ["--pp", 4], ["--pp", 2, "--dp", 2, "--ep", 2], []


def cache(settings: Path) -> dict[str, str]:
    """Return the environment variable that puts Fira's cache next to the settings."""
    return {"FIRA_CACHE": str(settings.parent / "cache")}


def train(
    settings: Path, ranks: int, *flags: object, status: int = 0, program: Path = TRAIN
) -> subprocess.CompletedProcess[str]:
    """Run the train command to its end and check its exit status."""
    result = run_ranks(ranks, program, "--config", settings, *flags, timeout=120, env=cache(settings))
    assert result.returncode == status, result.stdout + result.stderr
    return result


def errors(settings: Path, ranks: int, commands: Sequence[Sequence[object]]) -> list[str]:
    """Run the train command with each list of flags, all in one job, and return the one-line errors that end it.

    An error must be the same on all ranks; it is empty where there is none.
    """
    flags = [["--config", str(settings), *map(str, command)] for command in commands]
    module, environment = "tests.ranks.train_ranks", cache(settings)
    first, *others = run_function(ranks, module, "messages", timeout=170, env=environment, flags=flags)
    assert all(messages == first for messages in others)
    assert "\n" not in "".join(first)
    return first


def start(settings: Path, *flags: object) -> subprocess.Popen[str]:
    """Start a run on 4 ranks in the background, in a session of its own."""
    command = [mpirun(), "-np", "4", sys.executable, TRAIN, "--config", settings, *map(str, flags)]
    environment = inherited() | cache(settings)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT, env=environment
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 100) -> None:
    """Wait until a condition of a running process is met."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_all(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to mpirun and all ranks."""
    subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
    process.wait(30)


def losses(run: Path) -> np.ndarray:
    """Return training loss, gradient norm and auxiliary loss of every step, [steps, 3]."""
    log = read_log(run / "training_log.csv")
    assert list(log["iter"]) == list(range(1, len(log) + 1))
    return log[["train_loss", "grad_norm", "aux_loss"]].to_numpy()
