"""Reads a training log that grows, each row once, and keeps what the page shows of it."""

from __future__ import annotations

import math
from array import array
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from fira.errors import UserError
from fira.metrics.csv_log import COLUMNS, parse_layers

MAX_POINTS = 800  # of a curve
MAX_COLUMNS = 200  # of a heat map
COMPARED = 1000  # bytes before the new rows, by which a log that has been replaced is recognised
CURVES = ("train_loss", "lr", "grad_norm", "tokens_per_s", "mfu", "load_imbalance", "bubble", "dropped")


class LogFollower:
    """The rows of a log so far. `update` reads the new ones; a log that was replaced is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reset()

    def _reset(self) -> None:
        self._offset, self._end, self._header = 0, b"", [""]
        self.steps = array("d")
        self._columns = {name: array("d") for name in (*CURVES, "val_loss")}
        self._loads: list[tuple[float, str]] = []  # of every `_stride`th row
        self._last_load = 0.0, ""
        self._stride, self._rows = 1, 0
        self.latest_loss = ""  # the last cell, which is not finite if the run has diverged

    def update(self) -> None:
        """Read the rows that have been completed since the last call. A file that is missing is an empty log."""
        with suppress(OSError), self._path.open("rb") as file:
            file.seek(self._offset - len(self._end))
            if file.read(len(self._end)) != self._end:
                self._reset()
            self._read(file)

    def _read(self, file: IO[bytes]) -> None:
        file.seek(self._offset)
        new = file.read()
        new = new[: new.rfind(b"\n") + 1]  # without an incomplete last row
        lines = new.decode(errors="replace").split("\n")[:-1]
        if lines and self._offset == 0:
            self._header = lines.pop(0).split(",")
            if self._header[:5] != COLUMNS[:5]:
                raise UserError(f"{self._path} is not a training log of Fira; give another folder")
        self._offset += len(new)
        self._end = (self._end + new)[-COMPARED:]
        for line in lines:
            self._add(dict(zip(self._header, line.split(","), strict=False)))

    def _add(self, row: dict[str, str]) -> None:
        step = _number(row.get("iter", ""))
        if not math.isfinite(step):
            return
        self.steps.append(step)
        self.latest_loss = row.get("train_loss") or self.latest_loss
        for name, values in self._columns.items():
            values.append(_number(row.get(name, "")))
        if row.get("expert_load"):
            self._last_load = step, row["expert_load"]
            if self._rows % self._stride == 0:
                self._loads.append(self._last_load)
            self._rows += 1
        if len(self._loads) >= 2 * MAX_COLUMNS:
            del self._loads[1::2]
            self._stride *= 2

    def curves(self) -> dict[str, list[list[float]]]:
        """Lists of steps and of values by column, without empty cells; means of several steps where there are many."""
        found = {name: _binned(self.steps, self._columns[name]) for name in CURVES}
        steps, losses = np.asarray(self.steps), np.asarray(self._columns["val_loss"])
        valid = np.isfinite(losses)
        count = int(valid.sum())
        chosen = np.unique(np.linspace(0, max(0, count - 1), min(count, MAX_POINTS)).round().astype(int))
        found["val_loss"] = [steps[valid][chosen].tolist(), losses[valid][chosen].tolist()]
        return {name: pair for name, pair in found.items() if pair[0]}

    def expert_load(self) -> dict[str, list[list[list[float]]] | list[float]]:
        """The steps, and [layer][column][expert] the load relative to the balanced one; empty without experts.

        Columns are the same number of steps apart, except the last one, which is the last step.
        """
        loads = self._loads[:: -(-len(self._loads) // (MAX_COLUMNS - 1)) or 1]
        if loads and loads[-1] != self._last_load:
            loads.append(self._last_load)
        parsed = []
        for step, cell in loads:
            with suppress(UserError, ValueError):
                parsed.append((step, parse_layers(cell)))
        layers = min((len(layers) for _, layers in parsed), default=0)
        relative = [
            [[round(share * len(step[layer]), 2) for share in step[layer]] for _, step in parsed]
            for layer in range(layers)
        ]
        return {"steps": [step for step, _ in parsed], "layers": relative}


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _binned(steps: array[float], values: array[float]) -> list[list[float]]:
    """Steps and values without those that are not finite; if there are more than MAX_POINTS, the means of bins."""
    finite = np.isfinite(values)
    x, y = np.asarray(steps)[finite], np.asarray(values)[finite]
    if len(x) > MAX_POINTS:
        starts = np.linspace(0, len(x), MAX_POINTS, endpoint=False).astype(int)
        sizes = np.diff([*starts, len(x)])
        x, y = x[[*starts[1:] - 1, len(x) - 1]], np.add.reduceat(y, starts) / sizes
    return [x.tolist(), [float(f"{value:.6g}") for value in y]]
