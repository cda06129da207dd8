"""Recipes: those of the repository are valid, and a mistake is a one-line error before any stage is run."""

import shlex
from pathlib import Path

import pytest

from fira.commands.recipe import check_arguments, main
from fira.errors import UserError
from fira.recipes.recipe_file import Recipe, read_recipe
from fira.recipes.stage_inputs import check_inputs
from tests.launch import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
TRAIN = '[stages.a]\ncommand = "train"\n'
TWO = TRAIN + 'steps = 3\ncompile = false\n[stages.b]\ncommand = "evaluate"\ncheckpoint = "{a}"\n'


def read(tmp_path: Path, content: str) -> Recipe:
    path = tmp_path / "r.toml"
    path.write_text(content)
    return read_recipe(path, None, check_arguments)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_of_the_repository_is_valid(path, capsys):
    main([str(path), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    stages = read_recipe(path, None, check_arguments).stages
    assert [line.split()[:2] for line in lines] == [["fira", stage.command] for stage in stages]
    assert all("{" not in line for line in lines)


def test_the_repository_has_the_recipes_of_the_documentation():
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert len(RECIPES) == 6
    assert all(f"`{path.name}`" in page for path in RECIPES)


def test_flags_references_and_lists(tmp_path):
    recipe = read(tmp_path, TWO + 'data = ["x y.txt", "{a}/z"]\ntasks = "{a}/t.jsonl,u.jsonl"')
    assert shlex.split(recipe.command_line(recipe.stages[0])) == [
        *("fira", "train", "--steps=3", "--no-compile", "--out=runs/r/a"),
    ]
    assert shlex.split(recipe.command_line(recipe.stages[1])) == [
        *("fira", "evaluate", "--checkpoint=runs/r/a", "--data", "x y.txt", "runs/r/a/z"),
        *("--tasks=runs/r/a/t.jsonl,u.jsonl", "--out=runs/r/b"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "unknown key x; a recipe has title, out and stages"),
        ("title = 3", "title: give a text"),
        ("", r"no stages; give a table \[stages.NAME\]"),
        ("[stages]\na = 3", "stage a: no command"),
        ("[stages.a]\nsteps = 3", 'stage a: no command; give one, as in command = "train"'),
        ('[stages."../a"]\ncommand = "train"', "a name has letters"),
        ('[stages.stages]\ncommand = "train"', "a name has letters"),
        ('[stages.a]\ncommand = "tarin"', "stage a: unknown command tarin; choose from questions, prepare, train"),
        ('[stages.a]\ncommand = "doctor"', "stage a: unknown command doctor"),
        (TRAIN + "step = 3", "stage a: fira train: unrecognized arguments: --step=3"),
        (
            '[stages.a]\ncommand = "train"\nsteps = 0',
            "stage a: fira train: argument --steps: give an integer",
        ),
        (TRAIN + 'model = "x"', "stage a: --model x: no such preset"),
        (TRAIN + 'resume = "auto"', "stage a: resume is not a key of a stage"),
        (TRAIN + 'elastic = "1:2"', "stage a: elastic is not a key of a stage"),
        (TRAIN + 'config = "a.toml"', "stage a: config is not a key of a stage; give the flags as keys"),
        (TRAIN.replace("stages.a", 'stages."a.old"'), "does not end with .old"),
        (TRAIN + 'out = "x"', "stage a: out is the folder of the stage, a"),
        (TRAIN + "seconds = 0", "stage a: seconds: give a number greater than 0"),
        (TRAIN + "data = { x = 1 }", "stage a: data: give"),
        (
            '[stages.a]\ncommand = "evaluate"',
            "stage a: fira evaluate: the following arguments are required",
        ),
        ('[stages.a]\ncommand = "evaluate"\ncheckpoint = "x"', "stage a: .*nothing to evaluate"),
        ('[stages.a]\ncommand = "export"\ncheckpoint = "x"\ntype = "f16"', "stage a: .*--type is for --format gguf"),
        (TWO.replace("{a}", "{c}"), r"stage b: \{c\} is not an earlier stage"),
        (TWO.replace("{a}", "{b}"), r"stage b: \{b\} is not an earlier stage"),
        ("[stages.a", "is not TOML"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_place(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, content)
    assert str(error.value).startswith(str(tmp_path / "r.toml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ('command = "train"\ndata = "chats.jsonl=0.5,{a}/x.jsonl=0.5"', "data chats.jsonl"),
        ('command = "train"\ninit = "runs/gone"', "init runs/gone"),
        ('command = "evaluate"\ncheckpoint = "{a}"\ndata = ["{a}/x.txt", "y.txt"]', "data y.txt"),
        ('command = "evaluate"\ncheckpoint = "{a}"\ntasks = "arc_easy,q.jsonl"', "tasks q.jsonl"),
    ],
)
def test_missing_files_are_found_before_the_first_stage(tmp_path, flags, missing):
    recipe = read(tmp_path, f"{TRAIN}[stages.b]\n{flags}")
    with pytest.raises(UserError, match=f"stage b: {missing}: no such file or folder"):
        check_inputs(recipe)


def test_names_of_datasets_and_outputs_of_stages_need_no_file(tmp_path):
    check_inputs(read(tmp_path, TWO + 'data = ["org/name:config[:100]", "{a}/x.txt"]\ntasks = "arc_easy"'))
