"""Findings: one line of the diagnosis each, with what to do if it is a problem."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "OK"
    PROBLEM = "PROBLEM"  # training works, but not everything does, or not at full speed
    FATAL = "FATAL"  # training is impossible


@dataclass(frozen=True)
class Finding:
    """A fact about the machine. remedy: what to do, one line; given unless the level is OK."""

    subject: str
    text: str
    level: Level = Level.OK
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.subject:<18}{self.level:<9}{self.text}"
        return f"{line}\n{'':<27}→ {self.remedy}" if self.remedy else line


Check = Callable[[], Sequence[Finding]]
ShowLine = Callable[[str], object]  # prints a line


def examine(checks: Sequence[tuple[str, Check]]) -> Iterator[Finding]:
    """Yield the findings of the checks, given as (subject, check). A check that raises is itself a finding."""
    for subject, check in checks:
        try:
            yield from check()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            bug = "report this line as a bug; the other lines do not depend on it"
            remedy = f"pip install {error.name}" if isinstance(error, ModuleNotFoundError) else bug
            yield Finding(subject, f"this check failed: {reason}", Level.PROBLEM, remedy)
