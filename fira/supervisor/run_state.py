"""What the files of a run folder say about the progress of the run."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fira.checkpoint.step_folders import LATEST
from fira.metrics.csv_log import LOG_NAME
from fira.training.finish_marker import FINISHED

TAIL = 1 << 16  # bytes at the end of the log that contain a whole row


@dataclass(frozen=True)
class RunState:
    """Versions of the files that change when the run proceeds, and the steps in them.

    A version is the time of the last change in ns, 0 if there is no file. saved_step: of the newest checkpoint.
    logged_step: of the last row of the log.
    """

    saved: int
    saved_step: int
    log: int
    logged_step: int
    finished: int


def read_state(out: Path) -> RunState:
    """Read the state of the run in a folder, which does not have to exist."""
    latest, log = out / "checkpoints" / LATEST, out / LOG_NAME
    return RunState(_version(latest), _saved_step(latest), _version(log), _logged_step(log), _version(out / FINISHED))


def _version(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _saved_step(latest: Path) -> int:
    with suppress(OSError):
        if found := re.search(r"\d+", latest.read_text(errors="replace")):
            return int(found[0])
    return 0


def _logged_step(log: Path) -> int:
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        steps = re.findall(rb"^(\d+),.*\n", file.read(), re.M)
        return int(steps[-1]) if steps else 0
    return 0
