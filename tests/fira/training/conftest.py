"""Settings of small runs, an uninterrupted run and a killed run."""

import argparse
import shutil
from pathlib import Path

import pytest

from tests.fira.training.small_runs import PP4, SETTINGS, kill_all, start, train, wait_for
from tests.launch import ROOT


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --config file for a model that trains in seconds on one file of the standard library."""
    folder = tmp_path_factory.mktemp("settings")
    shutil.copy(argparse.__file__, folder / "text.txt")
    path = folder / "settings.toml"
    path.write_text(SETTINGS + f'data = "{folder / "text.txt"}"\n')
    return path


@pytest.fixture(scope="session")
def uninterrupted(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on four stages without interruption, by the program that users start."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    program = ROOT / "scripts" / "train.py"
    result = train(settings, 4, *PP4, "--out", out, "--trace", out.parent / "trace.json", program=program)
    assert "next: python scripts/generate.py --checkpoint" in result.stdout
    return out


@pytest.fixture(scope="session")
def killed(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed by SIGKILL after its checkpoint of step 10."""
    out = tmp_path_factory.mktemp("killed") / "run"
    process = start(settings, *PP4, "--out", out)
    wait_for((out / "checkpoints" / "latest").exists, process)
    kill_all(process)
    assert not (out / "checkpoints" / "step-000020").exists()
    return out
