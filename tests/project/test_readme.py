"""The README is true: its commands run, and what it names is there."""

import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launch import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split(" #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
SETUP = "python -m venv .venv && . .venv/bin/activate && pip install -q -r requirements.txt && "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout to the commands, with texts to train on; what they write stays in it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "texts").mkdir()
    (folder / "texts" / "one.txt").write_text(README * 3)
    rows = "\n".join(f'"{line}"' for line in README.replace('"', "'").splitlines() if line)
    (folder / "pages.csv").write_text(f"Text\n{rows}\n")
    return folder


def run(command: str, place: Path) -> str:
    """A README command where its set-up has been done, as short as it can be."""
    command = command.removeprefix(SETUP)
    if "train.py" in command:
        steps = 2 if "--resume" not in command else 3
        command = re.sub(r"--steps \d+", "", command) + f" --steps {steps} --eval-sequences 4 --batch-size 4"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FIRA_CACHE": str(place / "cache"),
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def command_with(*words: str) -> str:
    """The one command of the README that has all these words."""
    (found,) = [command for command in COMMANDS if all(word in command for word in words)]
    return found


def test_the_first_command_trains_writes_resumes_and_plots(place):
    (first,) = [command for command in COMMANDS if command.endswith("mpirun -np 4 python scripts/train.py")]
    assert first.startswith(SETUP)
    output = run(first, place)
    (write,) = [command for command in COMMANDS if command.endswith('--prompt "def "')]
    assert "next: " + write in output
    assert {path.name for path in (place / "runs" / "fira-tiny").iterdir()} >= {
        "training_log.csv",
        "training_progress.png",
    }
    assert run(write + " --max-new-tokens 5", place).startswith("def ")
    assert run(command_with("--prompt - ") + " --max-new-tokens 5", place).startswith("import os")
    assert "exported" in run(command_with("export.py", "--out exported"), place)
    assert "resumed after step 2" in run(command_with("mpirun -np 2", "--resume auto"), place)


def test_commands_with_data(place):
    assert "Train on it" in run(command_with("prepare_data.py"), place)
    run(command_with("mpirun", "--data texts/ "), place)
    run(command_with("texts/=").removeprefix("mpirun -np 4 ") + " --vocab-size 300", place)
    run(command_with("--data pages.csv ") + " --vocab-size 300", place)
    run(command_with("plot.py", "fira-tiny-2"), place)
    assert (place / "comparison.png").exists()
    run(command_with("plot.py", "--experts"), place)


def test_the_second_command_runs_the_tests():
    assert command_with("python -m pytest") == SETUP + "python -m pytest"


def help_of(script: str) -> str:
    command = [sys.executable, ROOT / script, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace("[", "  ")


def test_the_other_commands_name_flags_that_exist():
    named = [(script, command) for command in COMMANDS for script in re.findall(r"scripts/\w+\.py", command)]
    scripts = sorted({script for script, _ in named})
    with ThreadPoolExecutor(2) as pool:
        helps = dict(zip(scripts, pool.map(help_of, scripts), strict=True))
    for script, command in named:
        for word in shlex.split(command.split(script)[1]):
            assert not word.startswith("--") or f"  {word} " in helps[script], (word, script)


@pytest.mark.parametrize("code", PYTHON, ids=["fira", "transformers"])
def test_the_python_of_the_readme(place, code):
    environment = os.environ | {"FIRA_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "def " in done.stdout


def test_every_file_it_names_is_there_and_every_file_is_named():
    table = README.split("## The house")[1]
    folder, named = ROOT, set()
    for row in re.findall(r"^\| (.+?) \| (.+) \|$", table, re.M):
        if heading := re.fullmatch(r"\*\*(\w+)/\*\*", row[0]):
            folder = ROOT / heading[1]
        named |= {folder / name for name in re.findall(r"`([\w/]+\.py|[\w]+/)`", row[0])}
    assert all(path.exists() for path in named), named
    for package in ("pipeline", "fira", "scripts"):
        for path in (ROOT / package).iterdir():
            if path.name not in ("__init__.py", "__pycache__"):
                assert path in named, f"the README's table does not name {path}"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
