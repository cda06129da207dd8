"""Publication, removal and search of checkpoint folders; a kill at any moment leaves a complete checkpoint."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fira.checkpoint.shards import Checkpoint, newest_valid
from fira.checkpoint.step_folders import continue_from, find, prune, publish, step_folders, step_name
from fira.errors import UserError
from tests.fira.checkpoint.checkpoint_files import MODEL, file_names
from tests.ranks.checkpoint_ranks import matches, newest_step, open_error, save_state, save_without_room


def test_find_accepts_run_checkpoints_and_step_folders(root: Path) -> None:
    for step in (50, 100, 1_000_000):
        save_state(str(root), step, keep=3)
    newest = root / "step-1000000"
    assert find(root.parent) == find(str(root)) == find(newest) == newest
    (root / "latest").write_text("step-000050\n")
    assert find(root) == root / "step-000050"
    for stale in ("step-000070\n", "../..\n", ""):
        (root / "latest").write_text(stale)
        assert find(root) == newest
    (root / "latest").unlink()
    assert find(root) == newest
    for missing in (root.parent / "nowhere", root / "latest"):
        with pytest.raises(UserError, match="no checkpoint here"):
            find(missing)


def test_run_continues_from_the_checkpoint_that_it_saved_last(root: Path) -> None:
    """A run that was continued from step 20 does not continue from a later checkpoint of the abandoned branch."""
    for step in (10, 20, 30, 40):
        save_state(str(root), step, keep=9)
    save_state(str(root), 25, keep=9)
    assert (root / "latest").read_text() == "step-000025\n"
    assert newest_step(str(root)) == 25
    continue_from(root / "step-000030")
    assert newest_step(str(root)) == 30
    continue_from(root / "step-000025")
    (root / "step-000025" / MODEL).unlink()
    assert newest_step(str(root)) == 20  # damaged: the one before it
    for step in (10, 20):
        shutil.rmtree(root / f"step-{step:06d}")
    assert newest_step(str(root)) == 40


def test_older_checkpoints_and_temporary_folders_are_removed(root: Path) -> None:
    for step in (10, 20, 30, 40):
        save_state(str(root), step, keep=9)
    (root / "step-000025.tmp").mkdir()
    (root / "step-000010.tmp").mkdir()
    (root / "notes").mkdir()
    save_state(str(root), 35, keep=2)  # a run that was resumed from step 30; 40 is not older
    assert file_names(root) == ["latest", "notes", "step-000030", "step-000035", "step-000040"]
    assert find(root).name == "step-000035"
    save_state(str(root), 50, keep=1)
    assert file_names(root) == ["latest", "notes", "step-000050"]


class Killed(BaseException):
    """Ends `save` without any clean-up, as SIGKILL does: no handler catches it."""


CALLS = [
    *((os, name) for name in ("rename", "replace", "fsync")),
    *((Path, name) for name in ("mkdir", "write_bytes")),
    (shutil, "rmtree"),
]


def break_at(patch: pytest.MonkeyPatch, moment: int, failure: BaseException) -> None:
    """Let call number `moment` to the file system fail; a write or a removal is then done partially."""
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
def test_failure_at_any_moment_leaves_a_complete_checkpoint(root: Path, step: int, failure: BaseException) -> None:
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
                message = str(error)
        if not isinstance(failure, Killed):
            assert re.fullmatch(f"checkpoint of step {step} failed: .*No space.*; .* is intact", message)
            assert f"step-{step:06d}.tmp" not in file_names(root)
        assert all(open_error(str(folder)) == "" for folder in step_folders(root).values())
        for found in (newest_valid(root), Checkpoint.open(find(root))):
            assert found is not None
            salt = found.document("config")["salt"]
            assert (found.step, salt) in {(100, 100), (step, 7)}
            assert matches(found, salt)
            outcomes.append(salt)
        save_state(str(root), step, salt=8)  # the next save succeeds and removes temporary folders
        assert matches(Checkpoint.open(find(root)), 8)
        assert file_names(root) == ["latest", *sorted({f"step-{step:06d}", f"step-{step - 50:06d}"})]
    assert len(outcomes) > 40
    assert set(outcomes) == {100, 7}


def test_all_files_are_synced_before_the_folder_is_renamed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    fsync, rename = os.fsync, os.rename

    def record(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def check(source: Path, target: Path) -> None:
        assert set(synced) == {source, *source.iterdir()}
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", check)
    save_state(str(root), 1)
    assert synced[-3:] == [root, root / "latest.tmp", root]


def test_file_that_does_not_fit_on_the_disk_is_named(root: Path) -> None:
    assert save_without_room(str(root), 50, rank=0, limit=1000).endswith("; there is no earlier checkpoint")
    save_state(str(root), 50)
    message = save_without_room(str(root), 100, rank=0, limit=1000)
    start = re.escape(f"checkpoint of step 100 failed: {root}/step-000100.tmp/{MODEL}: ")
    assert re.fullmatch(start + ".*File too large.*" + re.escape(f"; {root}/step-000050 is intact"), message)
    assert file_names(root) == ["latest", "step-000050"]
    assert newest_step(str(root)) == 50


def test_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoint of step 1 failed: .*file.*; there is no earlier checkpoint"):
        save_state(str(tmp_path / "file"), 1)


def make_folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def test_step_folders_are_newest_first_and_prefer_the_published_name(root: Path) -> None:
    assert step_folders(root) == {}
    make_folders(root, "step-000009", "step-1000000", "step-000100.old", "step-000050", "step-000050.old")
    make_folders(root, "step-000200.tmp", "step-000300.old.tmp", "step-12", "step-00000x", "steps")
    (root / "step-000400").write_text("a file")
    expected = {1_000_000: "step-1000000", 100: "step-000100.old", 50: "step-000050", 9: "step-000009"}
    assert list(step_folders(root).items()) == [(step, root / name) for step, name in expected.items()]
    assert step_name(7) == "step-000007"


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(0, [40]), (1, [40]), (2, [30, 40]), (3, [20, 30, 40]), (4, [10, 20, 30, 40]), (9, [10, 20, 30, 40])],
)
def test_keep_counts_the_new_checkpoint(root: Path, keep: int, kept: list[int]) -> None:
    make_folders(root, *map(step_name, (10, 20, 30, 50)), "step-000040.tmp")
    publish(root, 40)
    prune(root, 40, keep, damaged=[])
    assert file_names(root) == ["latest", *map(step_name, [*kept, 50])]  # a later checkpoint is never removed
    assert (root / "latest").read_text() == "step-000040\n"
