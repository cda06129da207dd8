"""The command `fira`: the list of commands, errors, and import of the chosen command only."""

import subprocess
import sys
from importlib import import_module

import pytest

from fira.cli import command_words
from fira.commands.entry_point import COMMANDS, run_command
from fira.errors import UserError
from tests.launch import ROOT


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_module_with_the_listed_description(name):
    module = import_module(f"fira.commands.{name}")
    assert module.__doc__.splitlines()[0].startswith(COMMANDS[name])
    assert callable(module.main)


def test_help_lists_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fira", "--help"])
    run_command()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_unknown_command_raises_one_line_error(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["fira", *arguments])
    with pytest.raises(UserError, match="choose from train, generate, chat") as error:
        run_command()
    assert "\n" not in str(error.value)


def test_unknown_command_ends_with_status_2_and_imports_no_torch():
    code = (
        "import sys; sys.argv = ['fira', 'trian']\n"
        "from fira.commands.entry_point import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_suggested_commands_follow_the_way_of_starting(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fira", "train"])
    assert command_words("prepare") == ["fira", "prepare"]
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    assert command_words("prepare") == ["python", "scripts/prepare_data.py"]
