"""The training log: one CSV row per step, also after a resume, and row 0 for the validation before the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fira.errors import UserError
from fira.files import errors_naming, is_at, replace, write_remedy

if TYPE_CHECKING:
    from pandas import DataFrame

LOG_NAME = "training_log.csv"
logger = logging.getLogger(__name__)
# Columns with a list of numbers per MoE layer: numbers are separated by spaces, layers by ';'.
PER_LAYER = {"expert_load", "expert_dropped", "layer_entropy"}


@dataclass(kw_only=True)
class Row:
    """One optimizer step. The fields, in this order, are the columns of the file; None is written as an empty cell.

    metrics: the numbers of the run's objective, by the names of further columns, see `TrainingLog`.
    """

    iter: int  # the step's number, from 1
    train_loss: float  # mean over the trained tokens, in nats, or over the pairs of the global batch; without aux_loss
    val_loss: float | None = None  # None if the step has no validation
    lr: float
    mfu: float | None = None  # model FLOPs over the machine's peak, 0 to 1
    tokens_per_s: float  # over all ranks
    grad_norm: float  # global, before clipping
    aux_loss: float | None = None
    load_imbalance: float | None = field(init=False)  # largest load × number of experts, worst layer; 1 is balanced
    expert_load: Sequence[Sequence[float]] = ()  # per MoE layer, each expert's fraction of the assignments
    bubble: float | None = None  # fraction of the step in which a stage is idle, 0 to 1
    dropped: float | None = None  # fraction of the assignments above the experts' capacity
    router_entropy: float | None = field(init=False)  # nats, mean over layers; at most log(number of experts)
    expert_dropped: Sequence[Sequence[float]] = ()  # per MoE layer, each expert's dropped fraction of its assignments
    layer_entropy: Sequence[Sequence[float]] = ()  # per MoE layer, the router's entropy in nats
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.load_imbalance = max((max(layer) * len(layer) for layer in self.expert_load), default=None)
        self.router_entropy = fmean(entropy for [entropy] in self.layer_entropy) if self.layer_entropy else None


COLUMNS = [column.name for column in fields(Row) if column.name != "metrics"]


class TrainingLog:
    """Appends rows to `path`; a row is in the file when `write` returns. Only one rank writes.

    metrics: names of the objective's numbers; each has two columns more, NAME of the step and val_NAME of a validation.

    With `resume_step` 0 the file is replaced. Otherwise the rows up to this step are kept; an incomplete last line and
    later rows, whose steps will be repeated, are removed. Raises UserError if the file is not a training log.
    A file that is removed or replaced during the run is written again, since the open file still has all rows.
    """

    def __init__(self, path: Path, resume_step: int = 0, metrics: Sequence[str] = ()) -> None:
        self._path, self._metrics = path, [column for name in metrics for column in (name, f"val_{name}")]
        header = ",".join([*COLUMNS, *self._metrics])
        kept = _rows_until(path, resume_step, header) if resume_step > 0 and path.exists() else []
        self._create("".join(line + "\n" for line in [header, *kept]))

    def _create(self, content: str) -> None:
        try:
            replace(self._path, content.encode())
        except UserError as error:
            raise UserError(f"{error}; {write_remedy(error)}") from None
        with errors_naming(self._path):
            self._file = self._path.open("a+", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append a row. Raises UserError if it cannot be written, as on a full disk; the rows before it remain."""
        self._append({**{name: getattr(row, name) for name in COLUMNS}, **row.metrics})

    def write_initial(self, val_loss: float, metrics: Mapping[str, float]) -> None:
        """Append row 0: the validation before the first step. metrics: its numbers, named val_NAME."""
        self._append({"iter": 0, "val_loss": val_loss, **metrics})

    def _append(self, values: Mapping[str, Any]) -> None:
        try:
            if not is_at(self._file, self._path):
                self._restore()
            self._file.write(",".join(_cell(values.get(name)) for name in (*COLUMNS, *self._metrics)) + "\n")
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # the rest of the row, which would be written at exit
                self._file.close()
            raise UserError(
                f"{self._path}: {error.strerror}; {write_remedy(error)}, then continue with --resume auto"
            ) from None

    def _restore(self) -> None:
        """Write the rows of the open file to the path again."""
        with self._file as removed:
            removed.seek(0)
            content = removed.read()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._create(content)
        logger.warning("%s was removed or replaced by another program and is written again", self._path)

    def close(self) -> None:
        self._file.close()


def read_log(path: Path, first: int = 1) -> DataFrame:
    """Return the log from the step `first` as a frame with the columns of `Row`, and those of metrics.

    Row 0 has the validation before the first step, and no other number.
    An empty cell is NaN; columns of PER_LAYER contain text (see `parse_layers`). Only the first five columns are
    required. Raises UserError if the file is missing or not a training log.
    """
    import pandas as pd

    lines = _complete_lines(path)
    header = lines[0].split(",") if lines else []
    if header[:5] != COLUMNS[:5]:
        raise _foreign(path, f"its first line does not begin with {','.join(COLUMNS[:5])}")
    rows = [[cell or None for cell in line.split(",")] for line in lines[1:]]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise _foreign(path, f"line {number} has {len(row)} cells, not {len(header)}")
    columns = [*COLUMNS, *(name for name in header if name not in COLUMNS)]
    numbers = [name for name in columns if name not in PER_LAYER]
    frame = pd.DataFrame(rows, columns=header).reindex(columns=columns)
    try:
        frame = frame.astype(dict.fromkeys(numbers, float) | {"iter": int})
    except (ValueError, TypeError) as error:
        raise _foreign(path, str(error)) from None
    return frame[frame["iter"] >= first].reset_index(drop=True)


def parse_layers(cell: str) -> list[list[float]]:
    """Parse a cell of a column in PER_LAYER: a list of numbers per MoE layer."""
    try:
        return [[float(number) for number in layer.split()] for layer in cell.split(";")]
    except ValueError:
        columns = ", ".join(sorted(PER_LAYER))
        raise UserError(
            f"{cell[:40]!r} in {columns} is not a list of numbers with spaces and ';'; correct or remove the row"
        ) from None


def _cell(value: float | Sequence[Sequence[float]] | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float):
        return f"{value:.9g}"  # nine digits represent a float32 exactly
    return ";".join(" ".join(f"{share:.3f}" for share in layer) for layer in value)


def _rows_until(path: Path, step: int, header: str) -> list[str]:
    lines = _complete_lines(path)
    if not lines or lines[0] != header:
        raise _foreign(path, f"its first line is not {header}")
    try:
        return [line for line in lines[1:] if int(line.split(",", 1)[0]) <= step]
    except ValueError:
        raise _foreign(path, "a row does not begin with its step's number") from None


def _complete_lines(path: Path) -> list[str]:
    """Return the lines that end in a newline; the last line is incomplete where the process was killed."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a run folder or its {LOG_NAME}") from None
    except UnicodeDecodeError:
        raise _foreign(path, "it is not text") from None
    return text[: text.rfind("\n") + 1].splitlines()


def _foreign(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not a training log of Fira: {reason}; move it away or give another file")
