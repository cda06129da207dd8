"""Checkpoints are read bitwise identical by any layout; several ranks raise the same errors."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fira.checkpoint import writer
from fira.checkpoint.manifest import read_manifest
from fira.checkpoint.shard_index import TensorShard
from fira.checkpoint.shards import Checkpoint, newest_valid, open_checkpoint
from fira.errors import UserError
from tests.fira.checkpoint.checkpoint_files import FILES, MODEL, file_names
from tests.launch import run_function
from tests.ranks.checkpoint_ranks import SHAPES, matches, newest_step, ranges_match, save_state, value
from tests.saving import save_checkpoint

RANKS = "tests.ranks.checkpoint_ranks"


def opened_files() -> str:
    return Path("/proc/self/maps").read_text() + "".join(
        str(path.resolve()) for path in Path("/proc/self/fd").iterdir()
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_closed_checkpoint_has_no_open_file_and_can_be_read_again(root: Path) -> None:
    """A checkpoint that is removed while a run continues from it must not occupy the disk until the end of the run."""
    checkpoint = Checkpoint.open(save_state(str(root), 1))
    tensors = [checkpoint.read(name) for name in SHAPES]
    assert str(root) in opened_files()
    checkpoint.close()
    del tensors
    assert str(root) not in opened_files()
    assert matches(checkpoint, salt=0)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def test_files_can_be_read_with_safetensors_json_and_sha256(root: Path) -> None:
    folder = Path(save_state(str(root), 100))
    assert folder == root / "step-000100"
    assert file_names(folder) == sorted(FILES)
    stored = load_file(folder / FILES[0]) | load_file(folder / FILES[1])
    assert stored.keys() == SHAPES.keys()
    assert all(torch.equal(tensor, value(name)) for name, tensor in stored.items())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 100
    assert manifest["versions"].keys() == {"python", "torch", "safetensors", "numpy", "mpi4py"}
    assert manifest["threads"] == torch.get_num_threads()
    for name in FILES[:-1]:
        raw = (folder / name).read_bytes()
        assert manifest["files"][name] == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.step, manifest["layout"]) == (100, {"ranks": 1})
    assert matches(checkpoint, salt=0)
    assert ranges_match(checkpoint)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 3, dtype=torch.float64),
        torch.randn(5, 3).to(torch.bfloat16),
        torch.randn(5, 3).to(torch.float16),
        torch.tensor([1e-45, -0.0, torch.finfo(torch.float32).max]),
        torch.arange(12).reshape(3, 4)[:, 1:3],
        torch.get_rng_state(),
        torch.tensor([True, False]),
        torch.tensor(-7, dtype=torch.int8),
        torch.empty(0, 3),
        torch.empty(3, 0, dtype=torch.int32),
        torch.nn.Parameter(torch.ones(2, 2)),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_every_dtype_and_shape_is_restored_bitwise(root: Path, tensor: torch.Tensor) -> None:
    folder = save_checkpoint(root, 1, [TensorShard("x", tensor, 0, tuple(tensor.shape))], [], {}, {}, {}, 2)
    restored = Checkpoint.open(folder).read("x")
    assert (restored.dtype, restored.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(as_bytes(restored), as_bytes(tensor))


def test_missing_or_duplicate_rows_raise(root: Path) -> None:
    rows = torch.ones(2, 3)
    for owned in (
        [TensorShard("x", rows, 1, (3, 3))],
        [TensorShard("x", rows, 0, (3, 3))],
        [TensorShard("x", rows, 0, (4, 3)), TensorShard("x", rows, 2, (4, 3))],
        [TensorShard("x", rows, 0, (2, 4))],
        [TensorShard("x", rows.to(torch.complex64), 0, (2, 3))],
        [TensorShard("x", rows, 0, (2, 2))],
        [TensorShard("x", torch.ones(()), 0, (1,))],
        [TensorShard("x", torch.ones(1), 0, ())],
    ):
        with pytest.raises(ValueError, match=r"^x: "):
            save_checkpoint(root, 1, owned, [], {}, {}, {}, 2)
    assert not root.exists()


def test_shards_with_different_dtypes_raise(root: Path) -> None:
    """The rows of one tensor, in files of two kinds."""
    first, second = TensorShard("x", torch.ones(2), 0, (4,)), TensorShard("x", torch.ones(2).double(), 2, (4,))
    for weights, optimizer in ((first, second), (second, first)):
        with pytest.raises(ValueError, match="x: rank 0 passes it twice, or with a different shape or dtype"):
            save_checkpoint(root, 1, [weights], [optimizer], {}, {}, {}, 2)


@pytest.mark.parametrize("name", ["a/b", "index", "manifest"])
def test_invalid_names_of_documents_and_files_raise(root: Path, name: str) -> None:
    for documents, files in (({name: {}}, {}), ({}, {f"{name}.json": b""})):
        with pytest.raises(ValueError, match=f"invalid names of checkpoint files: .*{name}.json"):
            save_checkpoint(root, 1, [], [], documents, files, {}, 2)
    assert not root.exists()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_permissions_of_new_files(root: Path, mask: int) -> None:
    previous = os.umask(mask)
    try:
        folder = Path(save_state(str(root), 1))
    finally:
        os.umask(previous)
    assert (folder / MODEL).stat().st_mode & 0o777 == 0o666 & ~mask


def test_failed_save_leaves_no_folder_and_names_the_newest_checkpoint(root: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "publish", fail)
        with pytest.raises(UserError, match=r"step 1 failed: no space; .*; there is no earlier checkpoint"):
            save_state(str(root), 1)
    for step in (50, 100):
        save_state(str(root), step, keep=3)
    monkeypatch.setattr(writer, "publish", fail)
    with pytest.raises(UserError, match=r"step 150 failed: no space; .*step-000100 is intact"):
        save_state(str(root), 150, keep=3)
    assert not list(root.glob("*.tmp"))


def test_folder_that_cannot_be_created_is_a_user_error(root: Path) -> None:
    root.parent.joinpath("file").touch()
    with pytest.raises(UserError, match=r"checkpoint of step 1 failed: .*; there is no earlier checkpoint"):
        save_state(str(root.parent / "file" / "checkpoints"), 1)


def test_missing_tensor_file_or_row_is_named(root: Path) -> None:
    checkpoint = Checkpoint.open(save_state(str(root), 1))
    with pytest.raises(UserError, match=r"step-000001 has no tensor layers\.9\.w"):
        checkpoint.read("layers.9.w")
    with pytest.raises(UserError, match=r"step-000001 has no trainer\.json"):
        checkpoint.document("trainer")
    assert not checkpoint.has_file("trainer.json")
    assert checkpoint.has_file("config.json")
    for start, stop in ((3, 8), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match=f"rows 0 to 7, not {start} to {stop}"):
            checkpoint.read("layers.1.norm.weight", start, stop)


def test_newest_undamaged_checkpoint_is_used_and_damaged_ones_are_reported(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_valid(root) is None
    for step in (50, 100, 150):
        save_state(str(root), step, keep=3)
    (root / "step-000200.tmp").mkdir()
    assert newest_step(str(root)) == 150
    assert not caplog.messages
    os.truncate(root / "step-000150" / MODEL, 9)
    (root / "step-000100" / "manifest.json").unlink()
    assert newest_step(str(root)) == 50
    lines = caplog.messages
    assert len(lines) == 2
    assert str(root / "step-000150" / MODEL) in lines[0]
    assert str(root / "step-000100") in lines[1]
    assert all(line.endswith("; using step-000050 instead") for line in lines)
    shutil.rmtree(root / "step-000050")
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        newest_valid(root)


def test_checkpoint_that_the_caller_refuses_counts_as_damaged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    def check(checkpoint: Checkpoint) -> None:
        if checkpoint.step > 50:
            raise UserError(f"{checkpoint.folder / 'config.json'} is invalid")

    for step in (50, 100):
        save_state(str(root), step)
    for found in (newest_valid(root, check), open_checkpoint(root, check), open_checkpoint(root.parent, check)):
        assert found is not None
        assert found.step == 50
    assert set(caplog.messages) == {f"{root}/step-000100/config.json is invalid; using step-000050 instead"}
    with pytest.raises(UserError, match=r"^\S+/step-000100/config\.json is invalid$"):
        open_checkpoint(root / "step-000100", check)


def test_manifest_that_is_nested_too_deeply_does_not_prevent_the_fallback(root: Path) -> None:
    for step in (50, 100):
        save_state(str(root), step)
    (root / "step-000100" / "manifest.json").write_text("[" * 100_000)
    assert newest_step(str(root)) == 50


# Several ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of `run_scenarios` on each of four ranks."""
    return run_function(4, RANKS, "run_scenarios", root=str(tmp_path_factory.mktemp("ranks")))


def test_checkpoint_of_four_ranks_is_read_by_four_two_and_one(results: list[dict[str, Any]]) -> None:
    folder = Path(results[0]["folder"])
    assert [(rank["folder"], rank["read"]) for rank in results] == [(str(folder), True)] * 4
    assert len(list(folder.glob("model-0000?-of-00004.safetensors"))) == 4
    assert run_function(2, RANKS, "read_state", path=str(folder.parent)) == [True] * 2
    assert read_manifest(folder).layout == {"ranks": 4}
    checkpoint = Checkpoint.open(folder)
    assert matches(checkpoint, salt=0)
    assert ranges_match(checkpoint)


def test_overlapping_shards_raise_on_every_rank(results: list[dict[str, Any]]) -> None:
    assert len({rank["overlap"] for rank in results}) == 1
    assert "embedding.weight: the shards of all ranks do not form the tensor" in results[0]["overlap"]
    assert not Path(results[0]["folder"]).parents[1].joinpath("overlap").exists()


def test_damage_found_by_one_rank_raises_on_all(results: list[dict[str, Any]]) -> None:
    assert {rank["error"] for rank in results} == {results[0]["error"]}
    assert results[0]["error"].startswith(f"{results[0]['damaged']} has 10 bytes, its manifest lists ")
    assert [rank["newest"] for rank in results] == [50] * 4
    assert [len(rank["warnings"]) for rank in results] == [1, 0, 0, 0]


def test_full_disk_of_one_rank_raises_on_all(results: list[dict[str, Any]]) -> None:
    assert len({rank["full"] for rank in results}) == 1
    assert "step-000100.tmp/model-00002-of-00004.safetensors: " in results[0]["full"]
    assert results[0]["full"].endswith("/full/step-000050 is intact")
    assert [rank["newest after full"] for rank in results] == [50] * 4
    assert file_names(Path(results[0]["folder"]).parents[1] / "full") == ["latest", "step-000050"]


def test_save_continues_when_the_slowest_rank_has_written_and_its_failure_raises_on_all(
    results: list[dict[str, Any]],
) -> None:
    complete, failed = zip(*(rank["background"] for rank in results), strict=True)
    assert all(rank == complete[0] for rank in complete)
    assert (complete[0]["error"], complete[0]["equal"]) == ("", True)
    assert complete[0]["behind"] >= 1  # at least rank 3 has not written yet
    assert all(rank == failed[0] for rank in failed)  # the same error in the same step
    message = failed[0]["error"]
    assert message.startswith("checkpoint of step 7 failed: [Errno 28] No space left on device; free some space")
    assert message.endswith("/background/step-000007 is intact")
    assert results[0]["background folders"] == ["latest", "step-000007"]
