"""The lock of a run folder: one holder at a time, released with the process, and safe against removal."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fira.errors import UserError
from fira.training.run_lock import RunLock
from tests.launch import inherited

HOLD = """
import sys, time
from pathlib import Path
from fira.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_second_holder_is_refused_in_one_line_that_names_the_first(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(UserError) as error:
        RunLock(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}; "
        "wait until it ends, or choose another folder as --out"
    )
    lock.release()
    RunLock(tmp_path).release()


def test_killed_process_releases_the_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=inherited()) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=f"is in use by process {process.pid} on "):
                RunLock(tmp_path)
        finally:
            process.send_signal(signal.SIGKILL)
        process.wait(10)
    RunLock(tmp_path).release()


def test_release_removes_the_folder_only_if_nothing_was_written_to_it(tmp_path: Path) -> None:
    for name, content in (("empty", None), ("used", "x")):
        (tmp_path / name).mkdir()
        lock = RunLock(tmp_path / name)
        if content:
            (tmp_path / name / "file").write_text(content)
        lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_lock_is_acquired_again_after_its_folder_was_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = RunLock(folder)
    assert lock.is_held()
    (folder / ".lock").unlink()
    folder.rmdir()
    assert not lock.is_held()
    lock.acquire()
    assert lock.is_held()
    with pytest.raises(UserError, match="is in use by"):
        RunLock(folder)
    lock.release()


def test_file_that_its_last_holder_removes_is_not_mistaken_for_the_lock(tmp_path: Path, monkeypatch) -> None:
    """Between open and flock, the last holder removes the file: a lock of the removed file would protect nothing."""
    flock = fcntl.flock

    def remove_first(*arguments: object) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".lock").unlink()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    lock = RunLock(tmp_path)
    assert lock.is_held()
    lock.release()


def test_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    RunLock(tmp_path).release()
    assert "no lock is possible (No locks available)" in caplog.text
