"""Adapters with train.py: resumption on another layout, what a checkpoint contains, and a base model that is moved."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fira import load_model
from fira.checkpoint.manifest import read_index, read_manifest
from fira.checkpoint.step_folders import find
from tests.fira.training.small_runs import ONE, PP2_DP2_EP2, TRAIN, cache, losses, train
from tests.launch import run_ranks

pytestmark = pytest.mark.slow

LORA = ["--lora", "rank=2,alpha=4,targets=attention+experts+head"]
TUNING = ["--steps", 8, "--save-every", 4, "--eval-every", 4, "--lr", 1e-2]


@pytest.fixture(scope="module")
def base(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "run"
    train(settings, 1, "--out", out, "--steps", 1)
    return out


@pytest.fixture(scope="module")
def tuned(settings: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    result = train(settings, 1, *ONE, "--init", base, *LORA, *TUNING, "--out", out)
    assert "of them in adapters" in result.stdout
    return out


def test_run_is_resumed_on_another_layout(settings: Path, tuned: Path, tmp_path: Path) -> None:
    """With the settings in its folder; losses and merged weights are bitwise those of the uninterrupted run."""
    run = shutil.copytree(tuned, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000008")
    resumed = run_ranks(4, TRAIN, *PP2_DP2_EP2, "--out", run, "--resume", "auto", timeout=100, env=cache(settings))
    assert resumed.returncode == 0, resumed.stderr
    np.testing.assert_array_equal(losses(run), losses(tuned))
    weights, expected = (load_model(folder).weights() for folder in (run, tuned))
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_checkpoint_has_adapters_and_their_moments_only(base: Path, tuned: Path) -> None:
    folder = find(tuned)
    names = read_index(folder, read_manifest(folder)).keys()
    adapters = {name for name in names if not name.startswith("exp_avg")}
    assert len(names) == 3 * len(adapters)
    assert len(adapters) == 2 * (4 * 6 + 1)  # q, k, v, o, w1 and w2 of four blocks, and the head
    assert all(".lora" in name for name in adapters)
    document = json.loads((folder / "lora.json").read_text())
    assert document["base"]["folder"] == str(find(base).resolve())


def test_adapted_weights_of_the_base_are_changed_and_no_others(base: Path, tuned: Path) -> None:
    before, after = load_model(base).weights(), load_model(tuned).weights()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.partition(".")[2].partition(".")[2] for name in changed} == {
        *(f"attention.{name}.weight" for name in "qkvo"),
        *("moe.experts.w1", "moe.experts.w2", "project.weight"),
    }


def test_base_model_that_is_moved_ends_with_one_line(settings: Path, base: Path, tuned: Path, tmp_path: Path) -> None:
    """As the message says, a link in its place is enough."""
    run, step, other = shutil.copytree(tuned, tmp_path / "run"), find(base), tmp_path / "base"
    resume = ["--out", run, "--resume", "auto", "--steps", 9]
    step.rename(other)
    try:
        result = run_ranks(2, TRAIN, *resume, timeout=100, env=cache(settings))
        step.symlink_to(other)
        train(settings, 1, *resume)
    finally:
        step.unlink(missing_ok=True)
        other.rename(step)
    assert result.returncode == 2
    (line,) = filter(None, result.stderr.splitlines())
    assert f"its base model {step.resolve()} is missing; move it back, or link it there" in line


def test_resuming_with_other_adapters_ends_with_one_line(
    settings: Path, tuned: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--init", base, "--lora", "rank=3,alpha=4,targets=head", *TUNING, "--steps", 9, "--out", tmp_path / "run"]
    result = train(settings, 1, *flags, "--resume", find(tuned), status=2)
    assert "was trained with --lora rank=2,alpha=4,targets=attention+experts+head; give the flags" in result.stderr
