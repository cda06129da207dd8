"""Resuming a run on the same layout, on other layouts and from a damaged checkpoint; refusal to overwrite a run."""

import shutil

import numpy as np
import pytest

from tests.fira.checkpoint.checkpoint_files import hashes
from tests.fira.training.small_runs import ONE, PP2_DP2_EP2, PP4, kill_all, losses, start, train, wait_for

LAST = "checkpoints/step-000020"

pytestmark = pytest.mark.slow


def test_resume_on_the_same_layout_is_bitwise_identical(settings, uninterrupted, killed, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    result = train(settings, 4, *PP4, "--out", run, "--resume", "auto")
    assert "resumed after step 10" in result.stdout
    assert (losses(run) == losses(uninterrupted)).all()
    assert hashes(run / LAST) == hashes(uninterrupted / LAST)


def test_resume_on_other_layouts_gives_equal_losses(settings, uninterrupted, killed, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    process = start(settings, *PP2_DP2_EP2, "--out", run, "--resume", "auto", "--save-every", 15)
    wait_for((run / "checkpoints" / "step-000015").exists, process)
    kill_all(process)
    shutil.rmtree(run / "checkpoints" / "step-000020", ignore_errors=True)
    train(settings, 1, *ONE, "--out", run, "--resume", run / "checkpoints" / "step-000015")
    np.testing.assert_allclose(losses(run), losses(uninterrupted), rtol=1e-6)


def test_damaged_checkpoint_is_reported_and_the_previous_one_used(settings, uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    damaged = sorted((run / "checkpoints" / "step-000020").glob("model-*.safetensors"))[0]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    result = train(settings, 2, "--out", run, "--resume", "auto", "--steps", 11, "--plan", "auto")
    assert f"step-000020/{damaged.name}" in result.stderr
    assert "resumed after step 10" in result.stdout


def test_existing_run_is_not_overwritten(settings, uninterrupted):
    before = (uninterrupted / "training_log.csv").read_bytes()
    result = train(settings, 1, "--out", uninterrupted, status=2)
    assert "already contains a run" in result.stderr
    assert (uninterrupted / "training_log.csv").read_bytes() == before
