"""Runs with Muon: resumed on another layout, and with another optimizer."""

import shutil
from pathlib import Path

import pytest
import torch

from fira.checkpoint.manifest import read_index, read_manifest
from fira.checkpoint.shards import Checkpoint
from tests.fira.training.small_runs import losses, train

LAST = "checkpoints/step-000020"
QUERY, EXPERTS, GATE = "layers.1.attention.q.weight", "layers.1.moe.experts.w1", "layers.1.moe.router.gate.weight"

pytestmark = pytest.mark.slow


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights and moments of a checkpoint."""
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in read_index(folder, read_manifest(folder))}


def test_muon_resumes_on_another_layout_bitwise_identical(settings, tmp_path):
    run = tmp_path / "run"
    flags = ["--optimizer", "muon", "--cautious-decay", "--lr-schedule", "wsd", "--warmup", 10, "--threads", 1]
    train(settings, 2, "--dp", 2, "--ep", 2, "--out", run, *flags)
    resumed = shutil.copytree(run, tmp_path / "resumed")
    train(settings, 1, "--out", resumed, "--resume", resumed / "checkpoints" / "step-000010")
    assert (losses(resumed) == losses(run)).all()
    first, second = tensors(run / LAST), tensors(resumed / LAST)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {f"exp_avg/{name}" for name in (QUERY, EXPERTS, GATE)} | {f"exp_avg_sq/{GATE}"} <= first.keys()
    assert not {f"exp_avg_sq/{name}" for name in (QUERY, EXPERTS)} & first.keys()


def test_another_optimizer_needs_override_and_starts_with_moments_of_zero(settings, uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    flags = ["--out", run, "--resume", "auto", "--steps", 21, "--optimizer", "muon", "--beta2", 0.9]
    refused = train(settings, 1, *flags, status=2)
    shown = "optimizer is adamw (here muon), beta2 is 0.95 (here 0.9); give the same values, or add --override\n"
    assert refused.stderr.endswith(shown)
    result = train(settings, 1, *flags, "--override")
    assert "the moments start at zero" in result.stderr
    saved = Checkpoint.open(run / "checkpoints" / "step-000021")
    assert saved.document("state")["updates"] == 1
    # After one update both moments of a parameter have the same gradient: (1 − β1) g, and (1 − β2) g².
    average, squared = (saved.read(f"{moment}/{GATE}") for moment in ("exp_avg", "exp_avg_sq"))
    torch.testing.assert_close(squared, 0.1 * (average / 0.1).square(), rtol=1e-4, atol=0)
