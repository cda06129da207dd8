"""Supervised runs whose ranks are killed: they end with the weights of an undisturbed run, and leave no process.

All ranks of a run share one core, so that each has one thread, whatever their number.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from argparse import __file__ as text
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

from fira.checkpoint.manifest import read_index, read_manifest
from fira.checkpoint.shards import Checkpoint
from fira.metrics.events import EVENTS
from fira.supervisor.job import processes
from fira.supervisor.run_state import read_state
from tests.launch import ROOT, inherited

SETTINGS = f"""
data = "{text}"
model_set = "d_model=16,num_layers=4,d_ff=16,n_head=2,dropout=0.1"
vocab_size = 300
seq-len = 16
batch_size = 6
steps = 50
eval_every = 1000
eval_sequences = 4
save_every = 8
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class SupervisedRun:
    """A supervisor in the background, whose processes have a variable in their environment that identifies them."""

    def __init__(self, folder: Path, cache: Path, *flags: object, choose_core: Callable[..., int] = min) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "settings.toml").write_text(SETTINGS)
        self.hosts, self.out = folder / "hosts", folder / "run"
        self.hosts.write_text("localhost:2\n")
        self.output = (folder / "output.txt").open("w+")
        self.mark = f"FIRA_TEST={folder}"
        command = [sys.executable, ROOT / "tests" / "ranks" / "train.py", "--config", folder / "settings.toml"]
        command += ["--elastic", "1:2", "--out", self.out, "--hosts", self.hosts, "--max-restarts", 10, *flags]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdout=self.output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=inherited() | {"FIRA_TEST": str(folder), "FIRA_CACHE": str(cache)},
            preexec_fn=lambda: os.sched_setaffinity(0, {choose_core(os.sched_getaffinity(0))}),
        )

    def events(self, *names: str) -> list[dict]:
        """The events with these names, in the order in which they were written."""
        path = self.out / EVENTS
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] in names]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 150
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def until_training(self, starts: int, ranks: int) -> None:
        """Wait until the job with this number has completed a step, on this number of ranks."""
        self.until(lambda: len(self.events("start")) >= starts)
        start = self.events("start")[starts - 1]
        assert start["ranks"] == ranks, self.text()
        started_ns = datetime.fromisoformat(start["time"]).timestamp() * 1e9
        self.until(lambda: (state := read_state(self.out)).log > started_ns and state.logged_step > start["step"])

    def kill_a_rank(self, chooser: random.Random, slots: int) -> None:
        """Send SIGKILL to a random rank of the running job, at a random time, and set the slots that are left."""
        time.sleep(chooser.uniform(0, 1.0))
        job = processes(self.events("start")[-1]["job"])
        ranks = [pid for pid in job if b"\0PMI_RANK=" in environment(pid) and b"train.py" in command_line(pid)]
        os.kill(chooser.choice(sorted(ranks)), signal.SIGKILL)
        self.hosts.write_text(f"localhost:{slots}\n")  # the launcher needs longer to end than this takes

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def processes(self) -> list[int]:
        """All processes of this run, in any session."""
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [pid for pid in pids if self.mark.encode() in environment(pid).split(b"\0")]

    def end(self) -> list[int]:
        """Kill what is left, and return it."""
        left = self.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(20)
        self.output.close()
        return left


def environment(pid: int) -> bytes:
    try:
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def weights_and_moments(run: Path) -> str:
    """SHA-256 of all tensors of the last checkpoint, whatever files they are in."""
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    checkpoint, digest = Checkpoint.open(folder), hashlib.sha256()
    for name in sorted(read_index(folder, read_manifest(folder))):
        digest.update(name.encode() + checkpoint.read(name).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_kills_shrinking_and_growing_do_not_change_the_weights(tmp_path: Path, cache: Path):
    undisturbed = SupervisedRun(tmp_path / "undisturbed", cache, choose_core=max)
    disturbed = SupervisedRun(tmp_path / "disturbed", cache)
    chooser = random.Random(1)
    try:
        disturbed.until_training(1, ranks=2)
        disturbed.kill_a_rank(chooser, slots=1)
        disturbed.until_training(2, ranks=1)
        disturbed.kill_a_rank(chooser, slots=1)
        disturbed.until_training(3, ranks=1)
        disturbed.hosts.write_text("localhost:2\n")
        disturbed.until_training(4, ranks=2)
        disturbed.kill_a_rank(chooser, slots=2)
        assert disturbed.process.wait(120) == 0, disturbed.text()
        assert undisturbed.process.wait(120) == 0, undisturbed.text()
    finally:
        left = [*undisturbed.end(), *disturbed.end()]
    assert left == []
    assert weights_and_moments(disturbed.out) == weights_and_moments(undisturbed.out)
    assert [start["ranks"] for start in disturbed.events("start")] == [2, 1, 1, 2, 2]
    order = [event["event"] for event in disturbed.events("start", "exit", "stop")]
    assert ("start", "start") not in pairwise(order), order  # the end of every job is reported
    assert order.count("exit") <= 3  # the supervisor may see the change of the hosts first, and report both
    assert {event["signal"] for event in disturbed.events("exit")} == {signal.SIGKILL}
    assert json.loads((disturbed.out / "finished.json").read_text())["step"] == 50
    assert [event["event"] for event in undisturbed.events("exit")] == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signals_to_the_supervisor_leave_no_process(tmp_path: Path, cache: Path, number: int, status: int):
    run = SupervisedRun(tmp_path, cache, "--save-every", 1000)
    try:
        run.until_training(1, ranks=2)
        run.process.send_signal(number)
        assert run.process.wait(30) == status, run.text()
        time.sleep(1)
    finally:
        left = run.end()
    assert left == []
    assert not (run.out / "finished.json").exists()
    saved = read_state(run.out).saved_step
    assert saved > 0 if number == signal.SIGTERM else saved == 0


def test_the_marker_of_a_finished_run(tmp_path: Path, cache: Path):
    """It is written at the last step, written again for a run that has all steps, and removed for more steps."""
    for settings in ([], ["--resume", "auto"]):
        run = SupervisedRun(tmp_path, cache, "--steps", 2, *settings)
        assert run.process.wait(60) == 0, run.text()
        run.end()
        (run.out / "finished.json").unlink()
    longer = SupervisedRun(tmp_path, cache, "--steps", 1000, "--resume", "auto")
    (run.out / "finished.json").write_text("{}")
    try:
        longer.until(lambda: read_state(longer.out).logged_step > 2)
        assert not (longer.out / "finished.json").exists()
    finally:
        longer.end()
