"""Saves in the background: what they wait for, how they fail, and what they remove."""

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from random import Random

import pytest
import torch

from fira.checkpoint.manifest import FileRecord
from fira.checkpoint.shard_index import TensorShard
from fira.checkpoint.shards import Checkpoint
from fira.checkpoint.step_folders import step_folders
from fira.checkpoint.tensor_file import TensorFile
from fira.checkpoint.writer import CheckpointWriter
from fira.errors import UserError
from pipeline.mpi.activity import activity_of
from tests.fira.checkpoint.checkpoint_files import MODEL, file_names
from tests.launch import ROOT, inherited
from tests.ranks.checkpoint_ranks import save_state


def start(writer: CheckpointWriter, step: int, x: torch.Tensor) -> None:
    writer.start(step, [TensorShard("x", x, 0, tuple(x.shape))], [], {"config": {}}, {}, {})


def wait_for_rank(writer: CheckpointWriter) -> None:
    assert writer._work is not None
    writer._work.result(10)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An event that the background thread waits for before it writes a file of tensors."""
    event, write = threading.Event(), TensorFile.write

    def waiting(file: TensorFile, path: Path) -> FileRecord:
        assert event.wait(10)
        return write(file, path)

    monkeypatch.setattr(TensorFile, "write", waiting)
    yield event
    event.set()


def test_training_continues_while_a_checkpoint_is_written(root: Path, gate: threading.Event) -> None:
    writer, x = CheckpointWriter(root, keep=2), torch.ones(1000)
    assert writer.finished() == 0  # nothing is in progress
    start(writer, 1, x)
    x += 1
    assert (writer.finished(), writer.step, writer.last) == (0, 1, None)
    gate.set()
    for published in ([], ["latest", "step-000001"]):  # a phase ends, but the next one begins in `advance`
        wait_for_rank(writer)
        assert writer.finished() == 1
        assert file_names(root) in (published, ["step-000001.tmp"])
        writer.advance(finished=0)  # not all ranks have completed it
        assert file_names(root) in (published, ["step-000001.tmp"])
        writer.advance(finished=1)
    wait_for_rank(writer)
    writer.advance(finished=1)
    assert (writer.finished(), writer.step, writer.last) == (0, None, root / "step-000001")
    assert Checkpoint.open(root / "step-000001").read("x").eq(1).all()


def test_one_save_is_in_progress(root: Path, gate: threading.Event) -> None:
    """The second save waits for the first."""
    writer, x = CheckpointWriter(root, keep=2), torch.ones(3)
    start(writer, 1, x)
    threading.Timer(0.1, gate.set).start()
    start(writer, 2, x + 1)
    assert writer.step == 2
    assert "step-000001" in file_names(root)
    writer.finish()
    assert file_names(root) == ["latest", "step-000001", "step-000002"]
    assert [Checkpoint.open(root / f"step-00000{i}").read("x")[0] for i in (1, 2)] == [1, 2]


def test_discarded_save_is_not_published_and_leaves_the_previous_checkpoint(root: Path) -> None:
    writer, x = CheckpointWriter(root, keep=1), torch.ones(3)
    start(writer, 1, x)
    writer.finish()
    start(writer, 2, x)
    writer.discard()
    assert (writer.step, writer.last) == (None, root / "step-000001")
    writer.finish()
    assert "step-000001" in file_names(root)
    assert "step-000002" not in file_names(root)
    start(writer, 3, x)
    writer.finish()
    assert file_names(root) == ["latest", "step-000003"]


def test_checkpoint_that_is_not_finite_is_refused_and_the_previous_one_remains(root: Path) -> None:
    writer, x = CheckpointWriter(root, keep=1), torch.ones(3)
    start(writer, 1, x)
    writer.finish()
    for kind in ("weights", "optimizer"):
        y, z = TensorShard("y", x.clone(), 0, (3,)), TensorShard("z", x.clone(), 0, (3,))
        bad = y if kind == "weights" else z
        bad.tensor[1] = float("inf")
        writer.start(2, [y], [z], {}, {}, {})
        wait_for_rank(writer)
        with pytest.raises(UserError) as error:
            writer.advance(finished=1)
        assert str(error.value) == (
            f"checkpoint of step 2 failed: {bad.name} contains numbers that are not finite; resume from an earlier "
            f"checkpoint with a lower --lr or --clip and --override; {root}/step-000001 is intact"
        )
        assert (writer.finished(), writer.step) == (0, None)
        assert file_names(root) == ["latest", "step-000001"]


def test_folder_removed_during_a_save_is_a_one_line_error(root: Path) -> None:
    writer = CheckpointWriter(root, keep=2)
    start(writer, 1, torch.ones(3))
    wait_for_rank(writer)
    shutil.rmtree(root)
    writer.advance(finished=1)
    wait_for = writer._work
    assert wait_for is not None
    with pytest.raises(UserError):
        wait_for.result(10)
    with pytest.raises(UserError) as error:
        writer.advance(finished=1)
    line = r"checkpoint of step 1 failed: .*config\.json: No such file.*; there is no earlier checkpoint"
    assert re.fullmatch(line, str(error.value))
    start(writer, 2, torch.ones(3))  # creates the folder again
    writer.finish()
    assert file_names(root) == ["latest", "step-000002"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "make the folder writable"),
        (errno.EACCES, "make the folder writable"),
        (errno.EIO, "check the folder and its disk"),
    ],
)
def test_remedy_depends_on_the_error(root: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for place in ("write_bytes", "mkdir"):  # in errors_naming, and outside
        with monkeypatch.context() as patch:
            patch.setattr(Path, place, fail)
            writer = CheckpointWriter(root, keep=2)
            start(writer, 1, torch.ones(3))
            with pytest.raises(UserError) as error:
                writer.finish()
        assert str(error.value).endswith(f"{os.strerror(number)}; {remedy}; there is no earlier checkpoint")


def test_failure_of_the_thread_is_reported_with_the_step_that_is_saved(root: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(TensorFile, "write", fail)
    calls: list[Callable[[CheckpointWriter], None]] = [  # after later steps of the training loop
        lambda writer: writer.advance(finished=1),
        lambda writer: writer.finish(),
        lambda writer: start(writer, 9, torch.ones(3)),
    ]
    for call in calls:
        writer = CheckpointWriter(root, keep=2)
        start(writer, 4, torch.ones(3))
        assert writer._work is not None
        wait([writer._work])
        with pytest.raises(RuntimeError, match="a defect") as error:
            call(writer)
        assert activity_of(error.value) == "saving step 4"


def damage(folder: Path) -> None:
    content = bytearray((folder / MODEL).read_bytes())
    content[-1] ^= 1
    (folder / MODEL).write_bytes(content)


def test_damaged_checkpoint_does_not_count_as_kept(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (50, 100):
        save_state(str(root), step)
    damage(root / "step-000100")
    save_state(str(root), 150)
    assert file_names(root) == ["latest", "step-000050", "step-000100", "step-000150"]
    assert [line.split(";")[0] for line in caplog.messages] == [
        f"{root}/step-000100/{MODEL} does not match its SHA-256"
    ]
    save_state(str(root), 200)  # 150 is undamaged
    assert file_names(root) == ["latest", "step-000150", "step-000200"]


def test_kept_checkpoints_are_checked_once_after_they_were_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, check = [], FileRecord.check
    monkeypatch.setattr(FileRecord, "check", lambda self, path: (checked.append(path.parent.name), check(self, path)))
    writer, x = CheckpointWriter(root, keep=3), torch.ones(3)
    for step in (1, 2, 3, 4):
        start(writer, step, x)
        writer.finish()
    files = len(file_names(root / "step-000004")) - 1  # without the manifest
    assert checked == [name for name in ("step-000001", "step-000002", "step-000003") for _ in range(files)]
    start(writer, 2, x)  # written again, as after a rollback
    start(writer, 3, x)
    writer.finish()
    assert checked[3 * files :] == ["step-000002"] * files


@pytest.mark.slow
def test_process_killed_at_random_moments_leaves_complete_checkpoints(root: Path) -> None:
    program = f"from tests.ranks.checkpoint_ranks import save_forever; save_forever({str(root)!r})"
    random, newest = Random(0), 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", program], env=inherited(), cwd=ROOT)
        try:
            deadline = time.monotonic() + 60
            while max(step_folders(root), default=0) < newest + 2:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.05))
        finally:
            process.kill()
            process.wait()
        checkpoints = [Checkpoint.open(folder) for folder in step_folders(root).values()]
        assert len(checkpoints) in (2, 3)  # three if an older one was not removed yet
        assert checkpoints[0].step >= newest + 2
        newest = checkpoints[0].step
        for checkpoint in checkpoints:
            assert checkpoint.document("config") == {"step": checkpoint.step}
            assert all(checkpoint.read(name).eq(checkpoint.step).all() for name in ("x", "y"))
