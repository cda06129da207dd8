"""The precision of a run that is continued."""

from pathlib import Path

import pytest

from fira.training import run_folder
from fira.training.config import TrainConfig


@pytest.fixture(autouse=True)
def one_rank(monkeypatch) -> None:
    monkeypatch.setattr(run_folder, "_broadcast", lambda value: value)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that was trained in bf16, with a checkpoint."""
    folder = tmp_path / "run"
    run_folder.create(folder, TrainConfig(precision="bf16"), {})
    (folder / "checkpoints" / "step-000010").mkdir(parents=True)
    (folder / "checkpoints" / "step-000010" / "manifest.json").touch()
    return folder


@pytest.mark.parametrize(("given", "expected"), [("auto", "bf16"), ("fp32", "fp32")])
@pytest.mark.parametrize("resume", ["auto", ".", "checkpoints", "checkpoints/step-000010"])
def test_resumed_run_keeps_its_precision(run, given, expected, resume):
    resume, out = ("auto", run) if resume == "auto" else (str(run / resume), run.parent / "new")
    assert run_folder.precision(TrainConfig(precision=given, resume=resume), out) == expected


def test_new_run_does_not_take_the_precision_of_another(run):
    assert run_folder.precision(TrainConfig(), run) == "auto"
    assert run_folder.precision(TrainConfig(init=str(run)), run.parent / "new") == "auto"


@pytest.mark.parametrize("content", [None, "precision", ""])
def test_run_without_a_stated_precision(run, content):
    (run / "config.toml").unlink()
    if content is not None:
        (run / "config.toml").write_text(content)
    assert run_folder.precision(TrainConfig(resume="auto"), run) == "auto"
