"""The wheel, installed into a virtual environment from which the checkout is not visible."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch import ROOT, mpirun

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODEL = ["--model-set", "d_model=16,num_layers=2,d_ff=16,n_head=2", "--vocab-size", "300", "--seq-len", "16"]


def run(command: Sequence[object], folder: Path, env: dict[str, str] | None = None) -> str:
    """Run a command in a folder without PYTHONPATH and return its standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | (env or {})
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment with the wheel and the packages of this one, except Fira itself."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    for name in ("fira", "pipeline"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source], folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    assert len(list((folder / "dist").glob("*.tar.gz"))) == 1
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    run([sys.executable, "-m", "pip", "--python", folder / "venv", "install", "--no-deps", "-q", wheel], folder)
    # sys.path only: an editable installation is a .pth file, which is not read in a folder added in this way.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_modules_and_data_come_from_the_wheel(installed, empty):
    code = "import fira, pipeline; print(fira.__file__, pipeline.__file__)"
    files = [Path(path) for path in run([installed / "python", "-c", code], empty).split()]
    assert all(path.is_relative_to(installed.parent) for path in files)
    assert all((path.parent / "py.typed").exists() for path in files)
    assert (files[0].parent / "serving" / "chat_page.html").exists()


@pytest.mark.slow
def test_version_is_the_one_of_the_metadata(installed, empty):
    assert run([installed / "fira", "--version"], empty) == f"fira {PROJECT['version']}\n"


@pytest.mark.slow
def test_two_ranks_train_two_steps_in_an_empty_folder(installed, empty, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text())
    flags = ["--data", text, "--steps", 2, "--batch-size", 4, "--eval-sequences", 4, *MODEL]
    # mpi4py finds the library of an MPI wheel in its own environment only.
    env = {"FIRA_CACHE": str(tmp_path / "cache"), "LD_LIBRARY_PATH": str(Path(sys.prefix, "lib"))}
    output = run([mpirun(), "-np", 2, installed / "fira", "train", *flags], empty, env)
    assert "step 2/2" in output
    assert 'next: fira generate --checkpoint runs/fira-tiny --prompt "' in output
    assert (empty / "runs" / "fira-tiny" / "checkpoints" / "latest").exists()
    generate = [installed / "fira", "generate", "--checkpoint", "runs/fira-tiny", "--prompt", "def ", "--quiet"]
    assert run([*generate, "--max-new-tokens", 2], empty).startswith("def ")


@pytest.mark.slow
def test_plan_finds_the_device_descriptions(installed, empty):
    output = run([installed / "fira", "plan", "--device", "t4", "--ranks", 4], empty)
    assert "mpirun -np 4 fira train" in output


def test_the_documented_test_command_is_the_one_of_ci():
    command = re.compile(r"^python -m venv .* python -m pytest$", re.M)
    (documented,) = command.findall((ROOT / "README.md").read_text())
    assert command.findall((ROOT / ".ci" / "run").read_text()) == [documented]
