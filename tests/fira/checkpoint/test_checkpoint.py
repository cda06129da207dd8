"""Checkpoints come back bit for bit on any layout, and are complete or refused by name, whatever happened to them."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fira.checkpoint import shards as checkpoint_module
from fira.checkpoint.manifest import encode, is_plain, seal
from fira.checkpoint.shards import Checkpoint, TensorShard, find, newest_valid, save
from fira.checkpoint.step_folders import step_folders
from fira.errors import UserError
from tests.launch import run_function
from tests.ranks.checkpoint_ranks import (
    SHAPES,
    matches,
    newest_step,
    ranges_match,
    refusal,
    save_state,
    save_without_room,
    value,
)

RANKS = "tests.ranks.checkpoint_ranks"
MODEL = "model-00001-of-00001.safetensors"
KINDS = [MODEL, "optimizer-00001-of-00001.safetensors", "config.json", "tokenizer.json", "index.json", "manifest.json"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest and seal it again, as a faulty or malicious writer would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (folder / "manifest.json").write_bytes(seal(manifest))


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the index and make the manifest agree with it."""
    index = json.loads((folder / "index.json").read_text())
    change(index["tensors"])
    raw = encode(index)
    (folder / "index.json").write_bytes(raw)
    record = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    edit_manifest(folder, lambda manifest: manifest["files"].update({"index.json": record}))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Round trips


def test_one_rank_writes_what_safetensors_json_and_sha256_read(root: Path) -> None:
    folder = Path(save_state(str(root), 100))
    assert folder == root / "step-000100"
    assert names(folder) == sorted(KINDS)
    stored = load_file(folder / KINDS[0]) | load_file(folder / KINDS[1])
    assert stored.keys() == SHAPES.keys()
    assert all(torch.equal(tensor, value(name)) for name, tensor in stored.items())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 100
    assert manifest["versions"].keys() == {"python", "torch", "safetensors", "numpy", "mpi4py"}
    assert manifest["threads"] == torch.get_num_threads()
    for name in KINDS[:-1]:
        raw = (folder / name).read_bytes()
        assert manifest["files"][name] == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.step, checkpoint.layout) == (100, {"ranks": 1})
    assert matches(checkpoint, salt=0)
    assert ranges_match(checkpoint)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 3, dtype=torch.float64),
        torch.randn(5, 3).to(torch.bfloat16),
        torch.randn(5, 3).to(torch.float16),
        torch.tensor([float("nan"), -0.0, float("inf")]),
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
def test_every_dtype_and_shape_comes_back_bit_for_bit(root: Path, tensor: torch.Tensor) -> None:
    folder = save(root, 1, [TensorShard("x", tensor, 0, tuple(tensor.shape))], [], {}, {}, {})
    back = Checkpoint.open(folder).read("x")
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(bits(back), bits(tensor))


def test_shards_that_leave_rows_out_or_come_twice_are_refused(root: Path) -> None:
    rows = torch.ones(2, 3)
    for shards in (
        [TensorShard("x", rows, 1, (3, 3))],
        [TensorShard("x", rows, 0, (3, 3))],
        [TensorShard("x", rows, 0, (4, 3)), TensorShard("x", rows, 2, (4, 3))],
        [TensorShard("x", rows, 0, (2, 4))],
        [TensorShard("x", rows.to(torch.complex64), 0, (2, 3))],
    ):
        with pytest.raises(ValueError, match=r"^x: "):
            save(root, 1, shards, [], {}, {}, {})
    assert not root.exists()


def test_a_tensor_or_file_that_is_not_there_is_named(root: Path) -> None:
    checkpoint = Checkpoint.open(save_state(str(root), 1))
    with pytest.raises(UserError, match=r"step-000001 holds no tensor layers\.9\.w"):
        checkpoint.read("layers.9.w")
    with pytest.raises(UserError, match=r"step-000001 holds no trainer\.json"):
        checkpoint.document("trainer")
    assert not checkpoint.has_file("trainer.json")
    assert checkpoint.has_file("config.json")
    with pytest.raises(ValueError, match="rows 0 to 7"):
        checkpoint.read("layers.1.norm.weight", 3, 8)


# Damage


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_refused_by_name(root: Path, name: str) -> None:
    folder = Path(save_state(str(root), 1))
    raw = (folder / name).read_bytes()
    for position in {*range(0, len(raw), 97), len(raw) - 1}:
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        (folder / name).write_bytes(damaged)
        message = refusal(str(folder))
        assert f"{folder / name} " in message, position
        assert "\n" not in message
    (folder / name).write_bytes(raw)
    assert refusal(str(folder)) == ""


@pytest.mark.parametrize("name", KINDS)
def test_a_truncated_or_missing_file_is_refused_by_name(root: Path, name: str) -> None:
    folder = Path(save_state(str(root), 1))
    size = (folder / name).stat().st_size
    for length in (size - 1, size // 2, 0):
        os.truncate(folder / name, length)
        assert name in refusal(str(folder))
    (folder / name).unlink()
    assert name in refusal(str(folder))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, root: Path) -> None:
    for content in ("[]", "{}", '{"manifest_version": 2}', "not JSON", "\0"):
        (tmp_path / "manifest.json").write_text(content)
        assert f"{tmp_path / 'manifest.json'} is" in refusal(str(tmp_path))
    assert "is not a checkpoint" in refusal(str(tmp_path / "nowhere"))
    folder = Path(save_state(str(root), 1))
    edit_manifest(folder, lambda manifest: manifest.update(version=2))
    assert "format version 2" in refusal(str(folder))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", ".", "", "a/b", "a\\b", "a\0"])
def test_a_manifest_cannot_lead_out_of_its_folder(root: Path, name: str) -> None:
    folder = Path(save_state(str(root), 1))
    (root / "x").write_text("secret")
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: {"size": 6, "sha256": "0" * 64}}))
    assert f"names {name!r}" in refusal(str(folder))
    assert not is_plain(name)


def test_an_index_that_does_not_give_every_row_once_is_refused(root: Path) -> None:
    changes: list[Callable[[dict], object]] = [
        lambda tensors: tensors["embedding.weight"].update(shape=[12, 3]),
        lambda tensors: tensors["embedding.weight"].update(parts=[]),
        lambda tensors: tensors["embedding.weight"].update(dtype="float31"),
        lambda tensors: tensors["embedding.weight"]["parts"][0].update(start=1),
        lambda tensors: tensors["embedding.weight"]["parts"].append({"file": MODEL, "start": 10, "rows": 1}),
        lambda tensors: tensors["embedding.weight"]["parts"][0].update(file="../../x"),
        lambda tensors: tensors["embedding.weight"].pop("shape"),
        lambda tensors: tensors["embedding.weight"].update(parts="none"),
    ]
    for step, change in enumerate(changes):
        folder = Path(save_state(str(root), step))
        edit_index(folder, change)
        assert f"{folder / 'index.json'} " in refusal(str(folder)), step


def test_an_index_that_belies_its_files_is_refused_when_read(root: Path) -> None:
    for step, change in enumerate(({"dtype": "float16"}, {"shape": [11, 1]}, {"shape": [11]})):
        folder = Path(save_state(str(root), step))
        edit_index(folder, lambda tensors, change=change: tensors["embedding.weight"].update(change))
        with pytest.raises(UserError, match=f"{MODEL}: embedding.weight is not what index.json says"):
            Checkpoint.open(folder).read("embedding.weight")


# Which one


def test_find_takes_a_run_folder_a_checkpoints_folder_and_a_step_folder(root: Path) -> None:
    for step in (50, 100, 1_000_000):
        save_state(str(root), step, keep=3)
    newest = root / "step-1000000"
    assert find(root.parent) == find(str(root)) == find(newest) == newest
    assert find(root, before=1_000_000) == find(root, before=101) == root / "step-000100"
    (root / "latest").write_text("step-000050\n")
    assert find(root) == root / "step-000050"
    for stale in ("step-000070\n", "../..\n", ""):
        (root / "latest").write_text(stale)
        assert find(root) == newest
    (root / "latest").unlink()
    assert find(root) == newest
    for nothing in (root.parent / "nowhere", root / "latest"):
        with pytest.raises(UserError, match="no checkpoint here"):
            find(nothing)
    with pytest.raises(UserError, match="no checkpoint before step 50 here"):
        find(root, before=50)


def test_the_newest_whole_one_is_used_and_damaged_ones_are_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert newest_valid(root) is None
    for step in (50, 100, 150):
        save_state(str(root), step, keep=3)
    (root / "step-000200.tmp").mkdir()
    assert newest_step(str(root)) == 150
    assert capsys.readouterr().err == ""
    os.truncate(root / "step-000150" / MODEL, 9)
    (root / "step-000100" / "manifest.json").unlink()
    assert newest_step(str(root)) == 50
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert str(root / "step-000150" / MODEL) in lines[0]
    assert str(root / "step-000100") in lines[1]
    assert all(line.endswith("; using step-000050 instead") for line in lines)
    shutil.rmtree(root / "step-000050")
    with pytest.raises(UserError, match="is whole"):
        newest_valid(root)


# Publishing


def test_older_ones_beyond_keep_and_rubbish_are_removed(root: Path) -> None:
    for step in (10, 20, 30, 40):
        save_state(str(root), step, keep=9)
    (root / "step-000025.tmp").mkdir()
    (root / "step-000010.tmp").mkdir()
    (root / "notes").mkdir()
    save_state(str(root), 35, keep=2)  # a run that went back to step 30 and on from there; 40 is not older
    assert names(root) == ["latest", "notes", "step-000030", "step-000035", "step-000040"]
    assert find(root).name == "step-000035"
    save_state(str(root), 50, keep=1)
    assert names(root) == ["latest", "notes", "step-000050"]


class Killed(BaseException):
    """Ends `save` where it stands: nothing catches it, so nothing tidies up, as after kill -9."""


CALLS = [
    *((os, name) for name in ("rename", "replace", "fsync")),
    *((Path, name) for name in ("mkdir", "write_bytes")),
    (checkpoint_module, "save_file"),
    (shutil, "rmtree"),
]


def break_at(patch: pytest.MonkeyPatch, moment: int, failure: BaseException) -> None:
    """Let the call to the file system number `moment` fail; a write or a removal is then half done."""
    calls = 0

    def breaking(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            if calls - 1 != moment:
                return function(*args, **kwargs)
            if function is rmtree:
                next(args[0].iterdir()).unlink()
            elif function is write_bytes:
                write_bytes(args[0], args[1][:-1])
            raise failure

        return call

    rmtree, write_bytes = shutil.rmtree, Path.write_bytes
    for owner, name in CALLS:
        patch.setattr(owner, name, breaking(getattr(owner, name)))


@pytest.mark.parametrize("failure", [Killed(), OSError(28, "No space left on device")], ids=["kill", "disk"])
@pytest.mark.parametrize("step", [100, 150], ids=["same step", "next step"])
def test_a_failure_at_any_moment_leaves_a_complete_checkpoint(root: Path, step: int, failure: BaseException) -> None:
    outcomes = []
    for moment in range(1000):
        shutil.rmtree(root, ignore_errors=True)
        for earlier in (50, 100):
            save_state(str(root), earlier, salt=earlier)
        with pytest.MonkeyPatch.context() as patch:
            break_at(patch, moment, failure)
            try:
                save_state(str(root), step, salt=7)
                break
            except (Killed, UserError) as error:
                told = str(error)
        if not isinstance(failure, Killed):
            assert re.fullmatch(f"checkpoint of step {step} failed: .*No space.*; .* is intact", told)
            assert f"step-{step:06d}.tmp" not in names(root)
        assert all(refusal(str(folder)) == "" for folder in step_folders(root).values())
        for found in (newest_valid(root), Checkpoint.open(find(root))):
            assert found is not None
            salt = found.document("config")["salt"]
            assert (found.step, salt) in {(100, 100), (step, 7)}
            assert matches(found, salt)
            outcomes.append(salt)
        save_state(str(root), step, salt=8)  # life goes on, and the rubbish goes
        assert matches(Checkpoint.open(find(root)), 8)
        assert names(root) == ["latest", *sorted({f"step-{step:06d}", f"step-{step - 50:06d}"})]
    assert len(outcomes) > 40
    assert set(outcomes) == {100, 7}


def test_everything_is_on_the_disk_before_the_folder_gets_its_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    fsync, rename = os.fsync, os.rename

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def check(source: Path, target: Path) -> None:
        assert set(synced) == {source, *source.iterdir()}
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", check)
    save_state(str(root), 1)
    assert synced[-3:] == [root, root / "latest.tmp", root]


def test_a_file_without_room_is_named_in_one_line(root: Path) -> None:
    assert save_without_room(str(root), 50, rank=0, limit=1000).endswith("; there was none before")
    save_state(str(root), 50)
    told = save_without_room(str(root), 100, rank=0, limit=1000)
    start = re.escape(f"checkpoint of step 100 failed: {root}/step-000100.tmp/{MODEL}: ")
    assert re.fullmatch(start + ".*File too large.*" + re.escape(f"; {root}/step-000050 is intact"), told)
    assert names(root) == ["latest", "step-000050"]
    assert newest_step(str(root)) == 50


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoint of step 1 failed: .*file.*; there was none before"):
        save_state(str(tmp_path / "file"), 1)


# Several ranks


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `everything` let each of four ranks see."""
    return run_function(4, RANKS, "everything", root=str(tmp_path_factory.mktemp("ranks")))


def test_four_ranks_write_and_four_two_and_one_read(seen: list[dict[str, Any]]) -> None:
    folder = Path(seen[0]["folder"])
    assert [(mine["folder"], mine["read"]) for mine in seen] == [(str(folder), True)] * 4
    assert len(list(folder.glob("model-0000?-of-00004.safetensors"))) == 4
    assert run_function(2, RANKS, "read_state", path=str(folder.parent)) == [True] * 2
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.layout == {"ranks": 4}
    assert matches(checkpoint, salt=0)
    assert ranges_match(checkpoint)


def test_shards_that_overlap_are_refused_on_every_rank(seen: list[dict[str, Any]]) -> None:
    assert len({mine["overlap"] for mine in seen}) == 1
    assert "embedding.weight: the ranks' shards do not make up one tensor" in seen[0]["overlap"]
    assert not Path(seen[0]["folder"]).parents[1].joinpath("overlap").exists()


def test_all_ranks_refuse_what_one_of_them_finds(seen: list[dict[str, Any]]) -> None:
    assert {mine["refusal"] for mine in seen} == {seen[0]["refusal"]}
    assert seen[0]["refusal"].startswith(f"{seen[0]['damaged']} has 10 bytes where its manifest says ")
    assert [mine["newest"] for mine in seen] == [50] * 4


def test_all_ranks_learn_that_one_of_them_has_no_room(seen: list[dict[str, Any]]) -> None:
    assert len({mine["full"] for mine in seen}) == 1
    assert "step-000100.tmp/model-00002-of-00004.safetensors: " in seen[0]["full"]
    assert seen[0]["full"].endswith("/full/step-000050 is intact")
    assert [mine["newest after full"] for mine in seen] == [50] * 4
    assert names(Path(seen[0]["folder"]).parents[1] / "full") == ["latest", "step-000050"]
