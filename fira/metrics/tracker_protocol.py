"""What the adapters of trackers have in common."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fira.metrics.samples_log import Sample

PROJECT = "fira"  # or experiment, of all runs


class Tracker(Protocol):
    """Adapter of one tracker, made from the arguments of `Adapter`. hint: how to view the run."""

    hint: str

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step by name."""

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write the samples of a step."""

    def picture(self, step: int, path: Path) -> None:
        """Write a PNG."""

    def close(self) -> None:
        """Wait until everything is written."""


# (run folder, name of the run, settings, first step) → the tracker's run of this name, which is continued if it exists
Adapter = Callable[[Path, str, Mapping[str, Any], int], Tracker]
