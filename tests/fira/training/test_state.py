"""Restoring the training state of a checkpoint: another model, layout or optimizer, other settings, forged files."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fira.checkpoint.manifest import read_index, read_manifest
from fira.checkpoint.shard_index import TensorShard
from fira.checkpoint.shards import Checkpoint, newest_valid
from fira.errors import UserError
from fira.models.registry import make_config, to_document
from fira.training.state import check_documents, check_settings
from tests.fira.checkpoint.checkpoint_files import write_document
from tests.fira.training.small_runs import losses, train
from tests.saving import save_checkpoint

LAST = "checkpoints/step-000020"
QUERY, EXPERTS, GATE = "layers.1.attention.q.weight", "layers.1.moe.experts.w1", "layers.1.moe.router.gate.weight"
SETTINGS = {"steps": 200, "lr": 0.006, "batch_size": 32, "seed": 42, "micro_batch_size": 8, "data": "a" * 64}
STATE: dict[str, Any] = {
    "step": 7,
    "updates": 7,
    "loader": {"consumed": 14},
    "loss_scale": {"value": 1.0, "good_steps": 0},
    "settings": SETTINGS,
}


def saved(folder: Path, **changes: Any) -> Checkpoint:
    """A checkpoint with a changed state; a value of None removes the key."""
    state = {key: value for key, value in (STATE | changes).items() if value is not None}
    return Checkpoint.open(save_checkpoint(folder, 7, [], [], {"state": state}, {}, {}, 2))


def test_equal_settings_are_accepted(tmp_path: Path) -> None:
    check_settings(saved(tmp_path), SETTINGS, override=False)


def test_every_difference_is_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, changed = saved(tmp_path), SETTINGS | {"lr": 0.1, "seed": 7, "data": "b" * 64}
    with pytest.raises(UserError) as error:
        check_settings(checkpoint, changed, override=False)
    shown = f"lr is 0.006 (here 0.1), seed is 42 (here 7), data is {'a' * 12} (here {'b' * 12})"
    assert str(error.value) == (
        f"{checkpoint.folder} was written with other settings: {shown}; give the same values, or add --override"
    )
    check_settings(checkpoint, changed, override=True)
    assert caplog.messages == [f"{checkpoint.folder} is continued with other settings: {shown}"]


def test_number_of_steps_may_change_and_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        check_settings(saved(tmp_path), SETTINGS | {"steps": 400}, override=False)
    assert caplog.messages == [
        "steps is 200 (here 400): the learning rate follows the schedule of the new number of steps"
    ]


def test_settings_that_earlier_versions_did_not_store_had_their_defaults(tmp_path: Path) -> None:
    """The settings above have neither an optimizer nor a schedule."""
    checkpoint = saved(tmp_path)
    defaults = {"optimizer": "adamw", "beta1": 0.9, "eps": 1e-8, "cautious_decay": False, "lr_schedule": "cosine"}
    check_settings(checkpoint, SETTINGS | defaults, override=False)
    with pytest.raises(UserError, match=r"optimizer is adamw \(here muon\), lr_schedule is cosine \(here wsd\);"):
        check_settings(checkpoint, SETTINGS | defaults | {"optimizer": "muon", "lr_schedule": "wsd"}, override=False)


def test_checkpoint_without_settings_is_accepted(tmp_path: Path) -> None:
    check_settings(saved(tmp_path, settings=None), SETTINGS, override=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 8}, "is of step 8, the checkpoint of step 7"),
        ({"step": "7"}, "step is '7', not an integer"),
        ({"updates": -1}, "updates is -1"),
        ({"loader": {"consumed": 1.5}}, "loader.consumed is 1.5"),
        ({"loader": None}, "loader is missing"),
        ({"loss_scale": {"value": 0, "good_steps": 0}}, "loss_scale.value is 0"),
        ({"settings": {"lr": {}}}, "settings.lr is a container"),
    ],
)
def test_forged_state_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"state\.json is ") as error:
        check_settings(saved(tmp_path, **changes), SETTINGS, override=True)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["state", "config"])
@pytest.mark.parametrize(
    "content", [b'{"step": 8, "upd', b"[]", b'{"family": "fira", "num_layers": "2"}', b"\xff", b"{}"]
)
def test_checkpoint_with_an_invalid_document_is_skipped(tmp_path: Path, name: str, content: bytes, caplog) -> None:
    """Its hash in the manifest matches."""
    documents = {"config": to_document(make_config("fira-tiny", {"num_layers": 1}))}
    weights = [TensorShard("x", torch.ones(2), 0, (2,))]
    for step in (7, 8):
        state = STATE | {"step": step}
        folder = save_checkpoint(tmp_path, step, weights, [], documents | {"state": state}, {}, {}, 2)
    assert newest_valid(tmp_path, check_documents).step == 8
    write_document(folder, name, content)
    assert newest_valid(tmp_path, check_documents).step == 7
    (message,) = caplog.messages
    assert f"{name}.json" in message
    assert message.startswith(str(folder))
    assert message.endswith("; using step-000007 instead")


def test_checkpoint_of_another_model_is_refused(settings, uninterrupted, tmp_path):
    resume = ["--resume", uninterrupted, "--steps", 21]
    result = train(settings, 1, "--out", tmp_path / "run", "--model-set", "d_model=32,n_head=2", *resume, status=2)
    message = "is of another model: its d_model is 16 (here 32), d_ff is 16 (here 256), dropout is 0.1 (here 0.0); give"
    assert message in result.stderr


def test_checkpoint_of_another_family_is_refused_without_a_list_of_its_fields(settings, uninterrupted, tmp_path):
    flags = ["--model", "mooshak-tiny", "--model-set", "num_layers=2", "--resume", uninterrupted, "--steps", 21]
    result = train(settings, 1, "--out", tmp_path / "run", *flags, status=2)
    assert "is of another model: its family is fira (here mooshak); give the flags" in result.stderr


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights and moments of a checkpoint."""
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in read_index(folder, read_manifest(folder))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [
        ((2, "--dp", 2, "--ep", 2, "--shard", "optimizer"), (1,)),
        ((1,), (2, "--dp", 2, "--ep", 1, "--shard", "parameters")),
        ((2, "--dp", 2, "--ep", 2, "--shard", "parameters"), (2, "--pp", 2)),
    ],
)
def test_muon_resumes_on_another_layout_bitwise_identical(settings: Path, tmp_path: Path, layouts: Any) -> None:
    run = tmp_path / "run"
    flags = ["--optimizer", "muon", "--cautious-decay", "--lr-schedule", "wsd", "--warmup", 10, "--threads", 1]
    train(settings, *layouts[0], "--out", run, *flags)
    resumed = shutil.copytree(run, tmp_path / "resumed")
    train(settings, *layouts[1], "--out", resumed, "--resume", resumed / "checkpoints" / "step-000010")
    assert (losses(resumed) == losses(run)).all()
    first, second = tensors(run / LAST), tensors(resumed / LAST)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {f"exp_avg/{name}" for name in (QUERY, EXPERTS, GATE)} | {f"exp_avg_sq/{GATE}"} <= first.keys()
    assert not {f"exp_avg_sq/{name}" for name in (QUERY, EXPERTS)} & first.keys()


@pytest.mark.slow
def test_another_optimizer_needs_override_and_starts_with_moments_of_zero(
    settings: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    flags = ["--out", run, "--resume", "auto", "--steps", 21, "--optimizer", "adamw", "--beta2", 0.9]
    refused = train(settings, 1, *flags, status=2)
    shown = "optimizer is muon (here adamw), beta2 is 0.95 (here 0.9); give the same values, or add --override\n"
    assert refused.stderr.endswith(shown)
    result = train(settings, 1, *flags, "--override")
    assert "the moments start at zero" in result.stderr
    saved = Checkpoint.open(run / "checkpoints" / "step-000021")
    assert saved.document("state")["updates"] == 1
    # After one update both moments of a parameter have the same gradient: (1 − β1) g, and (1 − β2) g².
    average, squared = (saved.read(f"{moment}/{GATE}") for moment in ("exp_avg", "exp_avg_sq"))
    torch.testing.assert_close(squared, 0.1 * (average / 0.1).square(), rtol=1e-4, atol=0)
