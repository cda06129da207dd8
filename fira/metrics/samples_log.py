"""Text samples of a run: one JSON line per step and prompt, also after a resume."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fira.errors import UserError
from fira.files import errors_naming, replace

SAMPLES = "samples.jsonl"  # file name in run folders


class Sample(NamedTuple):
    """A text that the model has generated. text: without the prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class SamplesLog:
    """The file samples.jsonl. It is replaced as a whole, so that a killed process leaves complete lines."""

    path: Path

    def keep(self, step: int) -> None:
        """Remove the samples after a step, because the later steps will be repeated."""
        if self.path.exists():
            self._replace(self._lines_until(step))

    def write(self, step: int, samples: Sequence[Sample]) -> None:
        """Write the samples of a step after those of earlier steps."""
        new = [json.dumps({"step": step, **sample._asdict()}, ensure_ascii=False) for sample in samples]
        self._replace([*self._lines_until(step - 1), *new])

    def _replace(self, lines: Sequence[str]) -> None:
        replace(self.path, "".join(line + "\n" for line in lines).encode())

    def _lines_until(self, step: int) -> list[str]:
        if not self.path.exists():
            return []
        try:
            with errors_naming(self.path):
                lines = self.path.read_text(encoding="utf-8").split("\n")
            return [line for line in lines if line and json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: not a log of samples ({error}); move it away") from None
