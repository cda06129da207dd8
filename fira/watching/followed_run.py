"""One run folder as JSON for the page. Files that are missing, incomplete or invalid are left out."""

import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fira import files
from fira.errors import UserError
from fira.json_reader import complete_objects
from fira.metrics.baselines import read_baselines
from fira.metrics.csv_log import LOG_NAME
from fira.metrics.events import read_events
from fira.metrics.run_marks import marks_of
from fira.metrics.samples_log import SAMPLES
from fira.training.config import CONFIG_NAME
from fira.training.finish_marker import FINISHED
from fira.watching.log_follower import LogFollower
from pipeline.timeline import read_trace

TRACE = "trace.json"  # in the run folder, if config.toml names no other
LARGEST_TRACE = 2**26  # bytes
RECENT_EVENTS, RECENT_SAMPLES = 100, 200
LIVE_S = 60.0  # without a new row for so many seconds, a run does not count as running
CONFIG_SHOWN = ("model", "init", "objective", "data", "batch_size", "seq_len", "lr", "optimizer", "precision", "seed")

Timeline = list[list[list[Any]]]  # [rank][action] kind, micro-batch, start and end in ms


class FollowedRun:
    """A run folder, which may not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = LogFollower(folder / LOG_NAME)
        self._trace: tuple[tuple[Path, int, int], Timeline] | None = None  # path, time of the change and size

    def overview(self) -> dict[str, Any]:
        """State, progress and curves."""
        problem = self._update()
        config, events = self._config(), read_events(self.folder)
        starts = [event for event in events if event["event"] == "train"]
        step = int(self._log.steps[-1]) if self._log.steps else 0
        return {
            "name": self.folder.resolve().name,
            "folder": str(self.folder),
            "state": problem or self._state(),
            "step": step,
            "latest_loss": self._log.latest_loss,
            "steps": config.get("steps"),
            "remaining_s": self._remaining(step, config.get("steps"), starts),
            "layout": starts[-1].get("layout") if starts else None,
            "ranks": starts[-1].get("ranks") if starts else None,
            "config": {name: config[name] for name in CONFIG_SHOWN if name in config},
            "baselines": self._baselines(),
            "marks": marks_of(events),
            "curves": self._log.curves(),
        }

    def details(self) -> dict[str, Any]:
        """Load of the experts, timeline, samples and events."""
        self._update()
        return {
            "experts": self._experts(),
            "timeline": self._timeline(),
            "samples": complete_objects(self.folder / SAMPLES)[-RECENT_SAMPLES:],
            "events": read_events(self.folder)[-RECENT_EVENTS:],
        }

    def _update(self) -> str | None:
        """Read new rows of the log. Return why it cannot be read, if it cannot."""
        try:
            self._log.update()
        except UserError as error:
            return str(error)
        return None

    def _experts(self) -> dict[str, Any]:
        with suppress(UserError):
            return self._log.expert_load()
        return {"steps": [], "layers": []}

    def _config(self) -> dict[str, Any]:
        with suppress(UserError):
            return files.read_toml(self.folder / CONFIG_NAME, CONFIG_NAME)
        return {}

    def _state(self) -> str:
        """finished, running, stopped, or waiting for the first row."""
        if (self.folder / FINISHED).exists():
            return "finished"
        age = self._log_age()
        return "waiting" if age is None else "running" if age < LIVE_S else "stopped"

    def _log_age(self) -> float | None:
        with suppress(OSError):
            return time.time() - (self.folder / LOG_NAME).stat().st_mtime
        return None

    def _remaining(self, step: int, steps: Any, starts: list[dict[str, Any]]) -> float | None:
        """Seconds until the last step at the mean pace since the last start; None if they are not known."""
        age = self._log_age()
        if self._state() != "running" or not starts or not isinstance(steps, int) or age is None:
            return None
        with suppress(KeyError, TypeError, ValueError):
            began, first = datetime.fromisoformat(starts[-1]["time"]).timestamp(), int(starts[-1]["step"])
            elapsed = time.time() - age - began
            if step > first and elapsed > 0:
                return round(elapsed / (step - first) * (steps - step))
        return None

    def _baselines(self) -> dict[str, float]:
        with suppress(UserError):
            return read_baselines(self.folder)
        return {}

    def _timeline(self) -> Timeline | None:
        """[rank][action] kind, micro-batch, start and end in ms of the traced step; None without a trace."""
        given = self._config().get("trace")
        for path in ([Path(str(given))] if given else []) + [self.folder / TRACE]:
            with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
                status = path.stat()
                key = path, status.st_mtime_ns, status.st_size
                if self._trace is None or self._trace[0] != key:
                    self._trace = key, _read_timeline(path) if status.st_size <= LARGEST_TRACE else []
                return self._trace[1] or None
        return None


def _read_timeline(path: Path) -> Timeline:
    """The actions of a trace; empty if it has none."""
    ranks = [
        [[str(a.kind), a.microbatch, round(1e3 * start, 3), round(1e3 * end, 3)] for a, start, end in spans]
        for spans in read_trace(path).spans
    ]
    return ranks if any(ranks) else []
