"""States of stages: what is done, interrupted, or changed, and what an edit changes."""

import time
from pathlib import Path

import pytest

from fira.errors import UserError
from fira.recipes.recipe_file import Recipe, read_recipe
from fira.recipes.stage_state import begin, complete, content_hash, interrupt, partial_output, read_record, state_of

CONTENT = """
[stages.a]
command = "x"
data = "DATA=0.5,OTHER=0.5"
[stages.b]
command = "x"
data = "{a}/one.txt"
[stages.c]
command = "x"
data = "{a}/two.txt"
size = 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path / "cache"))
    for name in ("data", "other"):
        (tmp_path / name).write_text(name)
    return tmp_path


def recipe_in(folder: Path, old: str = "", new: str = "") -> Recipe:
    path = folder / "r.toml"
    content = CONTENT.replace("DATA", str(folder / "data")).replace("OTHER", str(folder / "other"))
    path.write_text(content.replace(old, new))
    return read_recipe(path, str(folder / "out"), lambda command, arguments: None)


def run_all(recipe: Recipe) -> list[str]:
    """Run the stages that are not done with a command that writes two files; return their names."""
    ran = []
    for stage in recipe.stages:
        if state_of(recipe, stage) != "done":
            begin(recipe, stage, 1)
            out = partial_output(recipe, stage)
            out.mkdir()
            for name in ("one", "two"):
                used = [Path(recipe.resolve(text)) for text in stage.texts()]
                (out / f"{name}.txt").write_text(name + "".join(path.read_text() for path in used if path.exists()))
            complete(recipe, stage, time.monotonic())
            ran.append(stage.name)
    return ran


def states(recipe: Recipe) -> list[str]:
    return [str(state_of(recipe, stage)) for stage in recipe.stages]


def test_what_is_unchanged_is_done(folder):
    recipe = recipe_in(folder)
    assert states(recipe) == ["new", "new", "new"]
    assert run_all(recipe) == ["a", "b", "c"]
    assert run_all(recipe_in(folder)) == []
    assert run_all(recipe_in(folder, 'command = "x"\ndata', 'title = "y"\nseconds = 3\ncommand = "x"\ndata')) == []


def test_a_changed_flag_runs_its_stage_again_and_those_that_use_what_changed(folder):
    run_all(recipe_in(folder))
    assert run_all(recipe_in(folder, "size = 1", "size = 2")) == ["c"]
    assert run_all(recipe_in(folder, "size = 1", "size = 2")) == []
    assert run_all(recipe_in(folder, "=0.5,", "=0.7,")) == ["a", "c"]  # a writes the same files; c has size 1 again


def test_a_changed_input_file_runs_all_stages_that_depend_on_it(folder):
    run_all(recipe_in(folder))
    (folder / "other").write_text("changed")
    assert states(recipe_in(folder)) == ["changed", "done", "done"]  # before the first stage is run again
    assert run_all(recipe_in(folder)) == ["a"]  # the command writes the same files


@pytest.mark.parametrize("damage", ["remove", "change"])
def test_an_output_that_was_changed_is_written_again(folder, damage):
    recipe = recipe_in(folder)
    run_all(recipe)
    path = recipe.output("a") / "one.txt"
    path.unlink() if damage == "remove" else path.write_text("x")
    assert states(recipe) == ["changed", "changed", "done"]
    assert run_all(recipe) == ["a"]
    assert (recipe.out / "a.old").is_dir()


def test_an_interrupted_stage_leaves_no_output_and_starts_again(folder):
    recipe = recipe_in(folder)
    first = recipe.stages[0]
    begin(recipe, first, 2)
    partial_output(recipe, first).mkdir()
    (partial_output(recipe, first) / "half").write_text("x")
    assert state_of(recipe, first) == "started"
    assert not recipe.output("a").exists()
    assert begin(recipe, first, 1) == "started"
    assert not partial_output(recipe, first).exists()
    assert run_all(recipe) == ["a", "b", "c"]


def test_a_folder_of_another_origin_is_not_touched(folder):
    recipe = recipe_in(folder)
    recipe.output("a").mkdir(parents=True)
    with pytest.raises(UserError, match="exists, and no run of this recipe wrote it"):
        begin(recipe, recipe.stages[0], 1)


def test_a_command_without_output_and_a_damaged_record_are_one_line_errors(folder):
    recipe = recipe_in(folder)
    begin(recipe, recipe.stages[0], 1)
    with pytest.raises(UserError, match="a was removed; run the same command again"):
        complete(recipe, recipe.stages[0], time.monotonic())
    (recipe.out / "stages" / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        state_of(recipe, recipe.stages[0])


def test_the_durations_of_attempts_are_added(folder):
    recipe = recipe_in(folder)
    first = recipe.stages[0]
    begin(recipe, first, 1)
    interrupt(recipe, first, time.monotonic() - 20)
    assert begin(recipe, first, 1) == "started"
    partial_output(recipe, first).mkdir()
    (partial_output(recipe, first) / "one.txt").write_text("x")
    complete(recipe, first, time.monotonic() - 5)
    entry = read_record(recipe, first)
    assert entry is not None
    assert 25 <= entry.seconds < 26


def write_run(folder: Path) -> Path:
    """The files of a finished training run whose weights are those of step 2."""
    step = folder / "checkpoints" / "step-000002"
    step.mkdir(parents=True)
    for path in (step / "manifest.json", step / "model.safetensors", folder / "finished.json"):
        path.write_text(path.name)
    (folder / "training_log.csv").write_text(f"iter,seconds\n2,{time.monotonic()}\n")
    return folder


@pytest.mark.parametrize("damaged", ["checkpoints/step-000002/model.safetensors", "finished.json", "training_log.csv"])
def test_damage_of_a_run_is_a_change_and_its_times_are_not(folder, damaged):
    one, other = write_run(folder / "run"), write_run(folder / "same")
    assert content_hash(one) == content_hash(other) is not None
    (other / damaged).unlink()
    assert content_hash(one) != content_hash(other)
    if damaged.endswith("safetensors"):
        (other / damaged).write_text("x")
        assert content_hash(one) != content_hash(other)


def test_an_incomplete_output_does_not_replace_a_complete_one(folder):
    recipe = recipe_in(folder)
    run_all(recipe)
    changed = recipe_in(folder, "size = 1", "size = 2")
    begin(changed, changed.stages[2], 1)
    (folder / "out" / "c").mkdir()  # as a training run that is killed leaves it
    begin(recipe, recipe.stages[2], 1)
    assert (folder / "out" / "c.old" / "two.txt").exists()
    assert not (folder / "out" / "c").exists()
