"""The events of a run, such as its starts: a line in events.jsonl for each."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fira.files import errors_naming
from fira.json_reader import complete_objects

EVENTS = "events.jsonl"

logger = logging.getLogger(__name__)


class EventLog:
    """Appends to `events.jsonl` in the run folder, which is created if it does not exist."""

    def __init__(self, out: Path) -> None:
        self._path = out / EVENTS
        with errors_naming(out):
            out.mkdir(parents=True, exist_ok=True)

    def append(self, event: str, **fields: Any) -> None:
        """Write an event with its fields. The line is in the file when the method returns."""
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        with errors_naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def report(self, event: str, message: str, level: int = logging.INFO, **fields: Any) -> None:
        """Write an event of the supervisor, and log a message."""
        logger.log(level, "supervisor: %s", message)
        self.append(event, **fields)


def read_events(out: Path) -> list[dict[str, Any]]:
    """The events in a run folder; lines that are not events, such as an incomplete last one, are left out."""
    return [event for event in complete_objects(out / EVENTS) if isinstance(event.get("event"), str)]
