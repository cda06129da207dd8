"""Expected durations: of the file, scaled by what was measured, or of earlier runs."""

import time
from pathlib import Path

import pytest

from fira.recipes.eta import TimeLeft, overview
from fira.recipes.recipe_file import read_recipe
from fira.recipes.stage_state import begin, complete, interrupt

SECONDS = {"a": "seconds = 10", "b": "seconds = 60", "c": ""}
COMMANDS = {"a": "x", "b": "x", "c": "x"}


def content(commands: dict[str, str] = COMMANDS) -> str:
    return "".join(f'[stages.{name}]\ncommand = "{commands[name]}"\n{line}\n' for name, line in SECONDS.items())


@pytest.fixture
def recipe(tmp_path: Path):
    (tmp_path / "r.toml").write_text(content())
    return read_recipe(tmp_path / "r.toml", str(tmp_path / "out"), lambda command, arguments: None)


def test_durations_of_the_file_are_scaled_by_the_measured_ones(recipe):
    left = TimeLeft(recipe)
    a, b, c = recipe.stages
    assert left.describe(a) == ", about 00:10; the recipe ends in at least 01:10"
    left.finish(a, 20)
    assert left.describe(b) == ", about 02:00; the recipe ends in at least 02:00"
    left.skip(c)
    assert left.describe(b) == ", about 02:00; the recipe ends in 02:00"


def test_another_command_does_not_scale_a_duration(tmp_path):
    (tmp_path / "r.toml").write_text(content(COMMANDS | {"a": "y"}))
    recipe = read_recipe(tmp_path / "r.toml", str(tmp_path / "out"), lambda command, arguments: None)
    left = TimeLeft(recipe)
    left.finish(recipe.stages[0], 1)
    assert left.describe(recipe.stages[1]) == ", about 01:00; the recipe ends in at least 01:00"


def test_a_stage_takes_as_long_as_before(recipe):
    a, _, c = recipe.stages
    begin(recipe, c, 1)
    recipe.output("c").write_text("x")
    complete(recipe, c, time.monotonic() - 90)
    left = TimeLeft(recipe)
    left.finish(a, 5)
    assert left.describe(c) == ", about 01:30; the recipe ends in 02:00"
    assert overview(recipe).splitlines()[1:] == [
        "a      x        new    about 00:10",
        "b      x        new    about 01:00",
        "c      x        done   01:30",
    ]


def test_a_run_that_was_stopped_takes_the_rest_of_its_time(tmp_path):
    (tmp_path / "r.toml").write_text(content(COMMANDS | {"b": "train"}))
    recipe = read_recipe(tmp_path / "r.toml", str(tmp_path / "out"), lambda command, arguments: None)
    a, b, _ = recipe.stages
    for stage in (a, b):
        begin(recipe, stage, 1)
        interrupt(recipe, stage, time.monotonic() - 8)
    assert TimeLeft(recipe).describe(a) == ", about 00:10; the recipe ends in at least 01:02"  # it starts again
    assert TimeLeft(recipe).describe(b) == ", about 00:52; the recipe ends in at least 01:02"
