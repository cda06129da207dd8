"""Scores of the evaluations of a run: one row per step, task and metric, also after a resume."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fira.errors import UserError
from fira.evaluation.task_scores import TaskScores
from fira.files import errors_naming, replace

EVALUATIONS = "evaluation.csv"  # file name in run folders
HEADER = "iter,task,metric,score,error"


@dataclass(frozen=True)
class EvaluationLog:
    """The file evaluation.csv. It is replaced as a whole, so that a killed process leaves complete rows."""

    path: Path

    def keep(self, step: int) -> None:
        """Remove the rows after a step, because the later steps will be repeated."""
        if self.path.exists():
            self._replace(self._rows_until(step))

    def write(self, step: int, results: Sequence[TaskScores]) -> None:
        """Write the scores of a step after those of earlier steps."""
        rows = [
            f"{step},{_quoted(result.task)},{_quoted(metric)},{score.value:.9g},"
            + ("" if score.error is None else f"{score.error:.9g}")
            for result in results
            for metric, score in result.scores.items()
        ]
        self._replace([*self._rows_until(step - 1), *rows])

    def _replace(self, rows: Sequence[str]) -> None:
        replace(self.path, "".join(row + "\n" for row in (HEADER, *rows)).encode())

    def _rows_until(self, step: int) -> list[str]:
        if not self.path.exists():
            return []
        try:
            with errors_naming(self.path):
                lines = self.path.read_text(encoding="utf-8").split("\n")
            if lines[:1] != [HEADER]:
                raise ValueError(f"its first line is not {HEADER}")
            return [line for line in lines[1:] if line and int(line.partition(",")[0]) <= step]
        except ValueError as error:
            raise UserError(f"{self.path}: not a log of evaluations ({error}); move it away") from None


def _quoted(cell: str) -> str:
    """A text as a cell of CSV."""
    return f'"{cell.replace(chr(34), chr(34) * 2)}"' if any(mark in cell for mark in ',"\n\r') else cell
