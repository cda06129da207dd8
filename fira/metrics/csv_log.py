"""The training log: one CSV row per step, readable by anything, exact after a resume."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from fira.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

LOG_NAME = "training_log.csv"
PER_LAYER = {
    "expert_load",
    "expert_dropped",
    "layer_entropy",
}  # their cells: spaces between numbers, ';' between layers


@dataclass(kw_only=True)
class Row:
    """One optimizer step. The fields, in this order, are the columns of the file; None is an empty cell."""

    iter: int  # the step's number, from 1
    train_loss: float  # nats per token over the global batch, without the auxiliary loss
    val_loss: float | None = None  # None where it was not evaluated
    lr: float
    mfu: float | None = None  # model FLOPs over the machine's peak, 0 to 1
    tokens_per_s: float  # over all ranks
    grad_norm: float  # global, before clipping
    aux_loss: float | None = None
    load_imbalance: float | None = field(init=False)  # worst layer's largest load × experts; 1 is even
    expert_load: Sequence[Sequence[float]] = ()  # per MoE layer, each expert's fraction of the assignments
    bubble: float | None = None  # fraction of the step in which a stage waits, 0 to 1
    dropped: float | None = None  # fraction of the assignments that experts had no capacity for
    router_entropy: float | None = field(init=False)  # nats, mean of layers; at most log(number of experts)
    expert_dropped: Sequence[Sequence[float]] = ()  # per MoE layer, the fraction that each expert dropped of its own
    layer_entropy: Sequence[Sequence[float]] = ()  # per MoE layer, its router's entropy alone: how undecided it is

    def __post_init__(self) -> None:
        self.load_imbalance = max((max(layer) * len(layer) for layer in self.expert_load), default=None)
        self.router_entropy = fmean(entropy for [entropy] in self.layer_entropy) if self.layer_entropy else None


COLUMNS = [column.name for column in fields(Row)]
_HEADER = ",".join(COLUMNS)


class TrainingLog:
    """Appends rows to `path`; every row is in the file when `write` returns. One rank writes.

    With `resume_step` 0 the file starts anew. Otherwise the rows up to and including that step stay, and later ones,
    whose steps are done again, go, as does a line cut short by a kill. A file that is no training log is a UserError.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = _rows_until(path, resume_step) if resume_step > 0 and path.exists() else []
        aside = path.with_name(path.name + ".tmp")
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in [_HEADER, *kept])
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)  # a kill at any moment leaves the old file or the new one
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        self._file.write(",".join(_cell(getattr(row, name)) for name in COLUMNS) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> DataFrame:
    """The log as a frame with every column of `Row`: numbers, NaN where a cell is empty; those of PER_LAYER stay text.

    Columns after the first five may be absent from the file. UserError where the file is missing or no training log.
    """
    import pandas as pd

    lines = _whole_lines(path)
    header = lines[0].split(",") if lines else []
    if header[:5] != COLUMNS[:5]:
        raise _foreign(path, f"its first line does not begin with {','.join(COLUMNS[:5])}")
    rows = [[cell or None for cell in line.split(",")] for line in lines[1:]]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise _foreign(path, f"line {number} has {len(row)} cells, not {len(header)}")
    numbers = [name for name in COLUMNS if name not in PER_LAYER]
    frame = pd.DataFrame(rows, columns=header).reindex(columns=COLUMNS)
    try:
        return frame.astype(dict.fromkeys(numbers, float) | {"iter": int})
    except (ValueError, TypeError) as error:
        raise _foreign(path, str(error)) from None


def parse_layers(cell: str) -> list[list[float]]:
    """Read a cell of PER_LAYER back: a list of numbers per MoE layer."""
    try:
        return [[float(number) for number in layer.split()] for layer in cell.split(";")]
    except ValueError:
        columns = ", ".join(sorted(PER_LAYER))
        raise UserError(
            f"{cell[:40]!r} under {columns} is not numbers between spaces and ';': mend or remove that row"
        ) from None


def _cell(value: float | Sequence[Sequence[float]] | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float):
        return f"{value:.9g}"  # nine digits give a float32 back exactly
    return ";".join(" ".join(f"{share:.3f}" for share in layer) for layer in value)


def _rows_until(path: Path, step: int) -> list[str]:
    lines = _whole_lines(path)
    if not lines or lines[0] != _HEADER:
        raise _foreign(path, f"its first line is not {_HEADER}")
    try:
        return [line for line in lines[1:] if int(line.split(",", 1)[0]) <= step]
    except ValueError:
        raise _foreign(path, "a row does not begin with its step's number") from None


def _whole_lines(path: Path) -> list[str]:
    """The file's lines that end in a newline: a kill may cut the last one short."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a run folder or its {LOG_NAME}") from None
    except UnicodeDecodeError:
        raise _foreign(path, "it is not text") from None
    return text[: text.rfind("\n") + 1].splitlines()


def _foreign(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not a training log of Fira: {reason}; move it away or give another file")
