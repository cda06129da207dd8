"""Preference training with train.py: the stored reference, resumption on another layout, and errors."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fira import load_model
from fira.metrics.csv_log import read_log
from fira.posttraining.dpo import METRICS
from tests.fira.training.small_runs import ONE, PP2_DP2_EP2, TRAIN, cache, losses, train
from tests.launch import run_ranks
from tests.preferences import make_preferences, write_preferences

pytestmark = pytest.mark.slow

TUNING = ["--objective", "dpo", "--seq-len", 96, "--eval-every", 4, "--save-every", 4, "--steps", 8, "--lr", 1e-3]
TUNING += ["--model-set", ""]  # that of the settings has dropout
FILES = ("reference.json", "train-0.npy", "val-0.npy")


@dataclass
class Runs:
    """Two copies of a base model, and the run that began with the second one."""

    base: Path
    own_base: Path
    run: Path


@pytest.fixture(scope="module")
def data(settings: Path) -> Path:
    return write_preferences(settings.parent / "preferences.jsonl", make_preferences(60))


@pytest.fixture(scope="module")
def tuned(settings: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("dpo")
    runs = Runs(folder / "base", folder / "own-base", folder / "run")
    train(settings, 1, "--out", runs.base, "--seq-len", 96, "--steps", 1)
    assert load_model(runs.base).config.dropout == 0.1
    shutil.copytree(runs.base, runs.own_base)
    result = train(settings, 1, *ONE, "--init", runs.own_base, "--data", data, *TUNING, "--out", runs.run)
    assert "57 pairs with" in result.stdout
    assert "accuracy" in result.stdout
    shutil.rmtree(runs.own_base)
    return runs


def resumed(settings: Path, runs: Runs, out: Path, *flags: object, damaged: str = "", status: int = 0) -> str:
    """Resume a copy of the run from step 4 on two ranks, and return stderr."""
    run = shutil.copytree(runs.run, out)
    shutil.rmtree(run / "checkpoints" / "step-000008")
    if damaged:
        content = (run / "reference" / damaged).read_bytes()
        (run / "reference" / damaged).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    flags = ("--out", run, "--resume", "auto", *flags)
    result = run_ranks(2, TRAIN, "--pp", 2, *flags, timeout=100, env=cache(settings))
    assert result.returncode == status, result.stderr
    return result.stderr


def test_loss_begins_at_log_2_and_every_metric_has_columns(tuned: Runs) -> None:
    """The base model has dropout 0.1; with it, the log-probabilities would differ from the reference."""
    log = read_log(tuned.run / "training_log.csv")
    assert log["train_loss"][0] == pytest.approx(np.log(2), rel=1e-8)
    assert log.loc[0, ["reward_chosen", "reward_rejected", "reward_margin"]].tolist() == [0.0] * 3
    assert log["train_loss"].iloc[-1] < log["train_loss"][0]
    assert log[[*METRICS]].notna().all().all()
    assert log[[f"val_{name}" for name in METRICS]].notna().sum().tolist() == [2] * len(METRICS)
    np.testing.assert_allclose(log["reward_margin"], log["reward_chosen"] - log["reward_rejected"], atol=1e-6)
    assert load_model(tuned.run).config.dropout == 0.0


def test_run_is_resumed_on_another_layout_without_the_reference_model(
    settings: Path, tuned: Runs, tmp_path: Path
) -> None:
    run = shutil.copytree(tuned.run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000008")
    result = run_ranks(4, TRAIN, *PP2_DP2_EP2, "--out", run, "--resume", "auto", timeout=100, env=cache(settings))
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(losses(run), losses(tuned.run))
    columns = [*METRICS, *(f"val_{name}" for name in METRICS), "val_loss"]
    one, other = (read_log(folder / "training_log.csv")[columns].to_numpy() for folder in (run, tuned.run))
    np.testing.assert_array_equal(one, other)
    weights, expected = (load_model(folder).weights() for folder in (run, tuned.run))
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_damaged_reference_is_computed_again(settings: Path, tuned: Runs, tmp_path: Path) -> None:
    flags = ["--init", tuned.base]
    message = resumed(settings, tuned, tmp_path / "run", *flags, damaged="train-0.npy")
    assert "train-0.npy does not match its SHA-256" in message
    for name in FILES:
        again, written = ((folder / "reference" / name).read_bytes() for folder in (tmp_path / "run", tuned.run))
        assert again == written
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(tuned.run))


def test_reference_of_adapters_is_computed_again_from_the_base_model(settings: Path, data: Path, tuned: Runs) -> None:
    out = tuned.run.with_name("adapters")
    flags = ["--init", tuned.base, "--data", data, *TUNING, "--lora", "rank=2,alpha=2,targets=attention"]
    train(settings, 1, *flags, "--steps", 1, "--out", out)
    written = (out / "reference" / "train-0.npy").read_bytes()
    (out / "reference" / "train-0.npy").unlink()
    resume = ["--out", out, "--resume", "auto", "--steps", 2]
    result = run_ranks(1, TRAIN, *resume, timeout=100, env=cache(settings))
    assert result.returncode == 0, result.stderr
    assert (out / "reference" / "train-0.npy").read_bytes() == written


def test_without_reference_and_its_model_the_run_ends_with_one_line(
    settings: Path, tuned: Runs, tmp_path: Path
) -> None:
    (line,) = resumed(settings, tuned, tmp_path / "run", damaged="val-0.npy", status=2).splitlines()
    assert "val-0.npy does not match its SHA-256" in line
    assert str(tuned.own_base) in line


def test_reference_of_another_model_is_refused(settings: Path, tuned: Runs, tmp_path: Path) -> None:
    lines = resumed(settings, tuned, tmp_path / "run", "--init", tuned.run, damaged="train-0.npy", status=2)
    assert "was written with other settings: reference is" in lines.splitlines()[-1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "x" * 300}, "line 2: answer of 2 and 301 tokens"),
        (None, "no chats; give a file with prompt, chosen and rejected per row"),
    ],
)
def test_bad_data_end_with_one_line(
    settings: Path, tuned: Runs, tmp_path: Path, record: dict[str, Any] | None, message: str
) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(record)}\n")
    files = ["--data", tmp_path / "a.jsonl"] if record else []
    run = ["--init", tuned.base, *files, "--objective", "dpo", "--seq-len", 96, "--batch-size", 2, "--steps", 1]
    result = run_ranks(2, TRAIN, *run, "--out", tmp_path / "run", timeout=100, env=cache(settings))
    assert result.returncode == 2
    (line,) = filter(None, result.stderr.splitlines())
    assert message in line
