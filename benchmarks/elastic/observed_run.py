"""A supervised run in the background, of which samples are taken: step, loss and running ranks over wall time."""

import json
import math
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from fira.checkpoint.manifest import read_index, read_manifest
from fira.checkpoint.shards import Checkpoint
from fira.checkpoint.step_folders import find
from fira.metrics.csv_log import LOG_NAME, read_log
from fira.metrics.events import EVENTS
from fira.supervisor.job import processes

SAMPLE_S = 0.25


class ObservedRun:
    """A run in `folder/run` on the slots of `folder/hosts`.

    samples: rows with `time_s` since the start, `step`, `train_loss` and `ranks`. kills: rows with `time_s`, `slots`.
    """

    def __init__(self, folder: Path, ranks: str, slots: int, flags: Sequence[str]) -> None:
        folder.mkdir(parents=True)
        self.out, self.hosts = folder / "run", folder / "hosts"
        self.set_slots(slots)
        own = ["--out", self.out, "--hosts", self.hosts, "--elastic", ranks, "--max-restarts", 20, "--quiet"]
        self.samples: list[dict[str, float]] = []
        self.kills: list[dict[str, float]] = []
        self._started = time.monotonic()
        self._process = subprocess.Popen([sys.executable, "scripts/train.py", *map(str, own), *flags])

    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._started

    def set_slots(self, slots: int) -> None:
        """Change the number of ranks that can run."""
        self.hosts.write_text(f"localhost:{slots}\n")

    def ranks(self) -> list[int]:
        """The process ids of the ranks that are alive."""
        starts = [event for event in self.events() if event["event"] == "start"]
        return [pid for pid in processes(starts[-1]["job"]) if _is_rank(pid)] if starts else []

    def events(self) -> list[dict[str, Any]]:
        path = self.out / EVENTS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def observe(self, until: Callable[[], bool]) -> bool:
        """Take samples until a condition is met or the run has ended. Return whether it still runs."""
        while self._process.poll() is None and not until():
            rows = (self.out / LOG_NAME).read_text().splitlines()[1:] if (self.out / LOG_NAME).exists() else []
            step, loss = rows[-1].split(",")[:2] if rows else ("0", "nan")
            sample = {"step": int(step), "train_loss": float(loss or math.nan), "ranks": len(self.ranks())}
            self.samples.append({"time_s": self.seconds()} | sample)
            time.sleep(SAMPLE_S)
        return self._process.poll() is None

    def stop(self) -> int:
        """End the run if it still runs. Return its exit status."""
        self._process.terminate()
        return self._process.wait(120)

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.samples)

    def useful_seconds(self) -> float:
        """Duration of all steps that are part of the result, without repeated steps, validation and saving."""
        config = tomllib.loads((self.out / "config.toml").read_text())
        tokens = config["batch_size"] * Checkpoint.open(find(self.out)).document("config")["seq_len"]
        return float((tokens / read_log(self.out / LOG_NAME)["tokens_per_s"]).sum())


def tensors_sha256(run: Path) -> str:
    """SHA-256 of the names and values of all tensors of a run's last checkpoint, whatever files they are in."""
    folder = find(run)
    checkpoint, digest = Checkpoint.open(folder), sha256()
    for name in sorted(read_index(folder, read_manifest(folder))):
        digest.update(name.encode() + checkpoint.read(name).numpy().tobytes())
    return digest.hexdigest()


def _is_rank(pid: int) -> bool:
    """Whether a process of a job is a rank, and not the launcher or a helper of it."""
    try:
        environment, words = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline"))
    except OSError:
        return False
    return b"\0PMI_RANK=" in environment and b"scripts/train.py" in words
