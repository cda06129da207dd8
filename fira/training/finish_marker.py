"""The file `finished.json` in a run folder: it exists if and only if the run has reached its last step.

A loop outside of the program can test it: `until [ -e runs/a/finished.json ]; do …; done`.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

from fira.files import errors_naming, replace

FINISHED = "finished.json"


def mark_finished(out: Path, step: int) -> None:
    """Write the marker after the checkpoint of the last step. Called by one rank only."""
    content = {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    replace(out / FINISHED, f"{json.dumps(content)}\n".encode())


def remove_marker(out: Path) -> None:
    """Remove the marker of a run that is about to continue, if there is one."""
    with errors_naming(out / FINISHED):
        (out / FINISHED).unlink(missing_ok=True)
