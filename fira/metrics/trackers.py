"""Trackers of experiments, which get the rows of the training log, its pictures and text samples.

Each tracker has an adapter in a file of its own, which is imported only if `--track` names it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any

from fira.errors import UserError
from fira.files import one_line, replace
from fira.json_reader import read, record, text
from fira.metrics.csv_log import COLUMNS, PER_LAYER, Row
from fira.metrics.samples_log import Sample
from fira.metrics.tracker_protocol import Adapter, Tracker

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")  # the names of their packages as well
TRACKED = "tracking.json"  # file in run folders
NAME_LENGTH = 100  # characters of the folder's name in that of the run
MOST_PER_STEP = 256  # numbers of experts in a column, as a mean over steps; larger models have them every few steps

logger = logging.getLogger(__name__)


def parse_names(names: str | None) -> list[str]:
    """The names in the value of --track. Raises UserError for a tracker that does not exist."""
    found = [name.strip() for name in names.split(",")] if names else []
    for name in found:
        if name not in TRACKERS:
            raise UserError(f"--track {name}: no such tracker; choose from {', '.join(TRACKERS)}, with commas between")
    return found


def check_packages(names: str | None) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    for name in parse_names(names):
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder that a tracker has written has no origin
            raise UserError(f"--track {name} needs the package {name}; pip install -e '.[{name}]'")


def numbers_of(row: Row) -> dict[str, float]:
    """The numbers of a row by name: those of layers are NAME/layer_1, those of experts NAME/layer_1/expert_0."""
    found: dict[str, float | None] = dict(row.metrics)
    for name in COLUMNS:
        value = getattr(row, name)
        if name not in PER_LAYER:
            found[name] = value
        elif _is_written(row.iter, value):
            for layer, shares in enumerate(value, start=1):
                suffixes = [f"/expert_{expert}" for expert in range(len(shares))] if len(shares) > 1 else [""]
                found |= {f"{name}/layer_{layer}{end}": share for end, share in zip(suffixes, shares, strict=True)}
    return {name: float(value) for name, value in found.items() if value is not None and name != "iter"}


def _is_written(step: int, layers: Sequence[Sequence[float]]) -> bool:
    """Whether a column per layer is written in a step: in each one, unless the model has many experts."""
    return step % -(-max(1, sum(map(len, layers))) // MOST_PER_STEP) == 0


class Trackers:
    """The trackers of a run, used by one rank only.

    names: the value of --track. out: the run folder. settings: of the run. first: number of the first step, 1 or the
    one after a checkpoint. A run folder has one run in each tracker, which later starts continue. A tracker that fails,
    such as one without connection, is reported once and gets nothing more; training continues.
    """

    def __init__(self, names: str | None, out: Path, settings: Mapping[str, Any], first: int) -> None:
        self._out, self._settings = out, settings
        self._open: dict[str, Tracker] = {}
        self._start(parse_names(names), first)

    def _start(self, trackers: Sequence[str], first: int) -> None:
        name = _run_name(self._out) if trackers else ""
        for tracker in trackers:
            with self._reported(tracker):
                self._open[tracker] = _adapter(tracker)(self._out, name, self._settings, first)

    def row(self, row: Row) -> None:
        """Write a row of the training log."""
        if self._open:
            self.numbers(row.iter, numbers_of(row))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of a step by name."""
        self._each(lambda tracker: tracker.numbers(step, values))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write the text samples of a step."""
        self._each(lambda tracker: tracker.samples(step, samples))

    def rewind(self, step: int) -> None:
        """Continue after an earlier step, because the later ones will be repeated."""
        self._each(lambda tracker: tracker.close())
        self._start(list(self._open), step + 1)

    def finish(self, step: int) -> list[str]:
        """Write the pictures in the run folder, and end. Return how to view the run in each tracker."""
        for picture in sorted(self._out.glob("*.png")):
            self._picture(step, picture)
        self._each(lambda tracker: tracker.close())
        return [tracker.hint for tracker in self._open.values()]

    def _picture(self, step: int, path: Path) -> None:
        self._each(lambda tracker: tracker.picture(step, path))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._reported(name):
                call(tracker)

    @contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """Context manager in which a failure of a tracker is reported, and the tracker is not used again."""
        try:
            yield
        except Exception as error:  # packages have exceptions of their own, and those of their connection
            reason = one_line(error) or type(error).__name__
            logger.warning("--track %s: %s; training continues without it", name, reason)
            self._open.pop(name, None)


def _run_name(out: Path) -> str:
    """The name of the run in all trackers, which is unique, and stored in the run folder by the first start."""
    path = out / TRACKED
    if path.exists():
        stored: str = read(path, record({"run": text(r".{1,255}")}))["run"]
        return stored
    folder = re.sub(r"[^\w.-]", "-", out.resolve().name, flags=re.ASCII)[:NAME_LENGTH]  # as all trackers accept it
    name = f"{folder}-{token_hex(4)}"
    replace(path, json.dumps({"run": name}).encode() + b"\n")
    return name


def _adapter(name: str) -> Adapter:
    if name == "tensorboard":
        from fira.metrics.tensorboard_tracker import TensorBoardTracker

        return TensorBoardTracker
    if name == "wandb":
        from fira.metrics.wandb_tracker import WandbTracker

        return WandbTracker
    if name == "trackio":
        from fira.metrics.trackio_tracker import TrackioTracker

        return TrackioTracker
    from fira.metrics.mlflow_tracker import MlflowTracker

    return MlflowTracker
