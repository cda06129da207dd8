"""Resuming on the same and on other layouts, after damage, a rewind and with other flags; two jobs in one folder."""

import re
import shutil

import numpy as np
import pytest

from fira.checkpoint.shards import Checkpoint
from fira.checkpoint.step_folders import step_folders
from tests.fira.checkpoint.checkpoint_files import hashes, write_document
from tests.fira.training.small_runs import (
    ONE,
    PP2_DP2_EP2,
    PP4,
    TRAIN,
    cache,
    kill_all,
    losses,
    start,
    train,
    wait_for,
)
from tests.launch import run_ranks
from tests.ranks.checkpoint_ranks import newest_step

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


def test_checkpoint_with_an_invalid_state_is_reported_and_the_previous_one_used(settings, uninterrupted, tmp_path):
    """The hash of the file matches. A checkpoint that is given by its path is refused in one line."""
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    write_document(run / LAST, "state", b'{"step": 20, "upd')
    flags = ["--out", run, "--steps", 21, "--resume"]
    result = train(settings, 1, *flags, run / LAST, status=2)
    assert re.fullmatch(r"\S+/step-000020/state\.json is not valid JSON: [^\n]+\n", result.stderr)
    result = train(settings, 1, *flags, "auto")
    assert "step-000020/state.json is not valid JSON" in result.stderr
    assert "resumed after step 10" in result.stdout


def test_existing_run_is_not_overwritten(settings, uninterrupted):
    before = (uninterrupted / "training_log.csv").read_bytes()
    result = train(settings, 1, "--out", uninterrupted, status=2)
    assert "already contains a run" in result.stderr
    assert (uninterrupted / "training_log.csv").read_bytes() == before


def test_checkpoints_at_intervals_of_time_are_valid(settings, tmp_path):
    """Rank 0 decides: a rank that did not take part in a save would stop the others."""
    train(settings, 2, "--pp", 2, "--out", tmp_path / "run", "--save-every", "0.2s", "--keep", 50)
    folders = step_folders(tmp_path / "run" / "checkpoints")
    assert max(folders) == 20
    assert all(Checkpoint.open(folder).step == step for step, folder in folders.items())


def test_failed_save_ends_all_ranks_with_one_line_and_leaves_the_previous_checkpoint(settings, killed, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    (run / "checkpoints" / "step-000011.tmp").write_text("a file in the place of the temporary folder")
    result = train(settings, 4, *PP4, "--out", run, "--resume", "auto", "--save-every", 1, status=2)
    (line,) = filter(None, result.stderr.splitlines())
    assert re.fullmatch(r"checkpoint of step 11 failed: .*File exists.*; .*/step-000010 is intact", line)
    assert newest_step(str(run / "checkpoints")) == 10


def test_weights_that_are_not_finite_are_never_saved(settings, tmp_path):
    """The gradient of the first step is finite, its update is not."""
    run, flags = tmp_path / "run", ["--lr", 1e38, "--min-lr", 1e38, "--warmup", 0, "--save-every", 1]
    result = train(settings, 1, "--out", run, *flags, status=2)
    assert re.search(r"\); layers\.0\.\S+ is not finite since an earlier step; resume from", result.stderr)
    assert "no weight" not in result.stderr
    assert step_folders(run / "checkpoints") == {}


def test_second_job_in_the_same_folder_ends_in_one_line(settings, uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    first = start(settings, "--out", run, "--resume", "auto", "--steps", 3000, "--save-every", 3000)
    try:
        wait_for(lambda: len(losses(run)) > 21, first)
        second = train(settings, 2, "--out", run, "--resume", "auto", "--steps", 30, status=2)
        assert re.fullmatch(rf"{run} is in use by process \d+ on \S+; wait until it ends, .*\n", second.stderr)
        steps = len(losses(run))
        wait_for(lambda: len(losses(run)) > steps, first)
    finally:
        kill_all(first)
    assert train(settings, 1, "--out", run, "--resume", "auto", "--steps", 21)


def test_run_continues_on_its_branch_after_a_rewind(settings, uninterrupted, tmp_path):
    """A run that was continued from step 10 and saved step 12 does not continue from the older step 20."""
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    rewound = ["--out", run, "--resume", run / "checkpoints" / "step-000010"]
    train(settings, 1, *rewound, "--steps", 12, "--lr", 1e-4, "--override")
    result = train(settings, 1, "--out", run, "--resume", "auto", "--steps", 13, "--lr", 1e-4)
    assert "resumed after step 12" in result.stdout


def test_resume_needs_no_other_flag_and_names_differences(settings, uninterrupted, tmp_path):
    """The data, the model and the learning-rate schedule come from the run's config.toml."""
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    resume = ["--out", run, "--resume", "auto"]
    result = run_ranks(1, TRAIN, *resume, env=cache(settings))
    done = run / "checkpoints" / "step-000020"
    line = result.stdout.splitlines()[-1]
    assert line == f"nothing to do: {done} has all steps; give a larger --steps to continue the run"
    result = run_ranks(2, TRAIN, *resume, "--steps", 22, "--lr", 1, "--seed", 7, "--batch-size", 4, env=cache(settings))
    assert result.returncode == 2
    shown = "batch_size is 6 (here 4), seed is 42 (here 7)"
    assert re.search(
        rf"step-000020 was written with other settings: lr is 0\.04 \(here 1\.0\), {re.escape(shown)};", result.stderr
    )
    assert result.stderr.count("\n") == 1
    result = run_ranks(2, TRAIN, *resume, "--steps", 22, env=cache(settings))
    assert "resumed after step 20" in result.stdout, result.stderr
    assert "steps is 20 (here 22): the learning rate follows the schedule" in result.stdout
