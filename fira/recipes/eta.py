"""Expected duration of the stages of a recipe.

A stage takes as long as in its record, or else the `seconds` of the file. Those of the file are for another machine:
they are multiplied by the ratio of measured and expected durations of the stages that have ended.
"""

from tqdm import tqdm

from fira.recipes.recipe_file import Recipe, Stage
from fira.recipes.stage_state import State, read_record, state_of


class TimeLeft:
    """Durations of the stages that have not ended, as far as they are known."""

    def __init__(self, recipe: Recipe) -> None:
        records = {stage.name: read_record(recipe, stage) for stage in recipe.stages}
        self._measured = {name: entry.seconds for name, entry in records.items() if entry and entry.output}
        self._left = {stage.name: stage.seconds for stage in recipe.stages}
        self._expected_s = self._taken_s = 0.0

    def skip(self, stage: Stage) -> None:
        """Note that a stage is done without having been run."""
        self._left.pop(stage.name)

    def finish(self, stage: Stage, seconds: float) -> None:
        """Note the duration of a stage that was run."""
        expected = self._left.pop(stage.name)
        if expected is not None:
            self._expected_s += expected
            self._taken_s += seconds

    def describe(self, stage: Stage) -> str:
        """Expected duration of a stage that starts, and of it and all following ones; empty if it is not known."""
        own = self._seconds(stage.name)
        if own is None:
            return ""
        known = [seconds for name in self._left if (seconds := self._seconds(name)) is not None]
        more = "at least " if len(known) < len(self._left) else ""
        return f", about {_interval(own)}; the recipe ends in {more}{_interval(sum(known))}"

    def _seconds(self, name: str) -> float | None:
        if name in self._measured:
            return self._measured[name]
        expected = self._left[name]
        return None if expected is None else expected * self._scale()

    def _scale(self) -> float:
        return self._taken_s / self._expected_s if self._expected_s else 1.0


def _interval(seconds: float) -> str:
    return str(tqdm.format_interval(round(seconds)))


def overview(recipe: Recipe) -> str:
    """The stages with their states and durations, as lines of text. A state is that before any stage is run."""
    rows = [("stage", "command", "state", "time")]
    for stage in recipe.stages:
        state, entry = state_of(recipe, stage), read_record(recipe, stage)
        if state is State.DONE and entry:
            shown = _interval(entry.seconds)
        else:
            shown = f"about {_interval(stage.seconds)}" if stage.seconds else ""
        rows.append((stage.name, stage.command, str(state), shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
