"""The commands, the Python code and the links of the README work."""

import re
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.project.commands import SETUP, blocks, commands, make_checkout, run, run_python, shortened

README = (ROOT / "README.md").read_text()
COMMANDS = commands(README)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkout(tmp_path_factory.mktemp("readme"))


def command_with(*words: str) -> str:
    """The one command of the README that contains all these words."""
    (found,) = [command for command in COMMANDS if all(word in command for word in words)]
    return found


@pytest.fixture(scope="module")
def first_output(place):
    """The output of the first command, which trains a model."""
    assert COMMANDS[0] == SETUP + "mpirun -np 4 python scripts/train.py"
    return run(shortened(COMMANDS[0]), place)


def test_first_command_trains_and_its_output_names_the_next_command(first_output, place):
    assert "next: " + COMMANDS[1] in first_output
    files = {path.name for path in (place / "runs" / "fira-tiny").iterdir()}
    assert files >= {"training_log.csv", "training_progress.png", "checkpoints"}
    assert run(shortened(COMMANDS[1]), place).startswith("def ")


@pytest.mark.slow
@pytest.mark.usefixtures("first_output")
def test_next_steps_after_the_first_run(place):
    assert "resumed after step 2" in run(shortened(command_with("--resume auto")), place)
    assert run(command_with("chat.py"), place, stdin="/quit\n") is not None
    assert "perplexity" in run(command_with("evaluate.py"), place)
    assert "exported" in run(command_with("export.py"), place)


@pytest.mark.slow
def test_training_on_own_text(place):
    assert "validation loss" in run(shortened(command_with("--data texts/ --vocab")), place)


@pytest.mark.slow
def test_supervised_run(place):
    assert "validation loss" in run(shortened(command_with("--elastic")), place)
    assert (place / "runs" / "a" / "finished.json").exists()


@pytest.mark.slow
def test_recipe_can_be_run(place):
    """Its stages are parsed; the tests of fira/recipes run smaller ones."""
    assert "fira train --model=rish-olmoe-tiny" in run(command_with("recipe.py") + " --dry-run", place)


def test_test_command_is_the_one_that_ci_runs():
    assert command_with("python -m pytest") == SETUP + "python -m pytest"


def test_every_command_is_tested():
    assert len(COMMANDS) == 10


def test_python_code(place):
    (code,) = blocks(README, "python")
    assert "def " in run_python(code, place)


def test_readme_is_short():
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_existing_files(file):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / file).read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target
