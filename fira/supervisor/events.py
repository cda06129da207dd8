"""The events of a supervised run: a line in events.jsonl and a message on the console for each."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fira.files import errors_naming

EVENTS = "events.jsonl"

logger = logging.getLogger(__name__)


class EventLog:
    """Appends to `events.jsonl` in the run folder, which is created if it does not exist."""

    def __init__(self, out: Path) -> None:
        self._path = out / EVENTS
        with errors_naming(out):
            out.mkdir(parents=True, exist_ok=True)

    def write(self, event: str, message: str, level: int = logging.INFO, **fields: Any) -> None:
        """Write an event with its fields, and log a message. A line is in the file when the method returns."""
        logger.log(level, "supervisor: %s", message)
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        with errors_naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
