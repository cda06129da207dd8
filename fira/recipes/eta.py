"""Expected duration of the stages of a recipe.

A stage takes as long as in its record, or else the `seconds` of the file. Those of the file are for another machine:
they are multiplied by the ratio of measured and expected durations of the stages with the same command that have ended.
Other commands say little: a tokenizer that is found in the cache takes no time on any machine.
"""

from collections import defaultdict

from tqdm import tqdm

from fira.recipes.recipe_file import Recipe, Stage
from fira.recipes.stage_state import State, read_record, state_of


class TimeLeft:
    """Durations of the stages that have not ended, as far as they are known."""

    def __init__(self, recipe: Recipe) -> None:
        records = {stage.name: read_record(recipe, stage) for stage in recipe.stages}
        self._measured = {name: entry.seconds for name, entry in records.items() if entry and entry.output}
        self._interrupted = {name: entry.seconds for name, entry in records.items() if entry and not entry.output}
        self._left = {stage.name: stage for stage in recipe.stages}
        self._expected_s: defaultdict[str, float] = defaultdict(float)  # of the stages that have ended, by command
        self._taken_s: defaultdict[str, float] = defaultdict(float)

    def skip(self, stage: Stage) -> None:
        """Note that a stage is done. Its duration is that of the run in which it ended."""
        if stage.name in self._measured:
            self.finish(stage, self._measured[stage.name])
        else:
            del self._left[stage.name]

    def finish(self, stage: Stage, seconds: float) -> None:
        """Note the duration of a stage that was run."""
        del self._left[stage.name]
        if stage.seconds is not None:
            self._expected_s[stage.command] += stage.seconds
            self._taken_s[stage.command] += seconds

    def describe(self, stage: Stage) -> str:
        """Expected duration of a stage that starts, and of it and all following ones; empty if it is not known."""
        own = self._seconds(stage)
        if own is None:
            return ""
        known = [seconds for left in self._left.values() if (seconds := self._seconds(left)) is not None]
        more = "at least " if len(known) < len(self._left) else ""
        return f", about {_interval(own)}; the recipe ends in {more}{_interval(sum(known))}"

    def _seconds(self, stage: Stage) -> float | None:
        if stage.name in self._measured:
            return self._measured[stage.name]
        expected_s = self._expected_s[stage.command]
        scale = self._taken_s[stage.command] / expected_s if expected_s else 1.0
        done = self._interrupted.get(stage.name, 0.0) if stage.command == "train" else 0.0  # others start again
        return None if stage.seconds is None else max(0.0, stage.seconds * scale - done)


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
