"""The activity of a process: in exceptions, and in memory that other processes read."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.mpi.activity import activity, activity_of, doing, is_long, open_activity, seconds_since_long, share
from pipeline.mpi.guardian import claim, describe_death, read_activity, wait_status
from tests.launch import ROOT, inherited

CHILD = """
import os, sys, time
from pipeline.mpi.activity import doing, share
print(share(), flush=True)
with doing("step 7"), doing("backward of stage 1"):
    sys.stdin.readline()
    os._exit(3) if sys.argv[1] == "exit" else os.kill(os.getpid(), int(sys.argv[1]))
"""


def test_activities_are_nested() -> None:
    with doing("step 7"):
        with doing("backward", long=True):
            assert (activity(), is_long(), seconds_since_long()) == ("step 7, backward", True, 0)
        assert (activity(), is_long()) == ("step 7", False)
        assert 0 < seconds_since_long() < 60
    assert activity() == ""


def test_exception_has_the_innermost_activity_once() -> None:
    with pytest.raises(ValueError, match="no data") as caught, doing("step 7"), doing("backward"):
        raise ValueError("no data")
    assert activity_of(caught.value) == "step 7, backward"
    assert caught.value.__notes__ == ["activity: step 7, backward"]
    assert activity() == ""


def test_exception_outside_all_activities_has_none() -> None:
    assert activity_of(ValueError()) == ""


def test_other_threads_have_no_effect() -> None:
    def work() -> None:
        with doing("background"):
            seen.append(activity())

    seen: list[str] = []
    with doing("step 7"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert (seen, activity()) == (["step 7"], "")


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memfd_create")
@pytest.mark.parametrize(
    ("end", "text", "status"),
    [
        ("exit", "exited with status 3 in step 7, backward of stage 1; the job ends", 3),
        ("9", "was killed by SIGKILL (the kernel does this when memory runs out) in step 7, ", 137),
        ("37", "was killed by signal 37 in step 7, ", 165),
        ("11", "was killed by SIGSEGV in step 7, backward of stage 1; the job ends", 139),
    ],
)
def test_activity_is_readable_after_the_death_of_its_process(end: str, text: str, status: int) -> None:
    command = [sys.executable, "-c", CHILD, end]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=inherited()
    )
    assert child.stdin
    assert child.stdout
    memory = open_activity(child.pid, int(child.stdout.readline()))
    deadline = time.monotonic() + 20
    while read_activity(memory) != "step 7, backward of stage 1" and time.monotonic() < deadline:
        time.sleep(0.01)
    child.stdin.write("\n")
    child.stdin.flush()
    while not wait_status(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    message, exit_status = describe_death(1, child.pid, memory)
    assert message.startswith(f"rank 1 (process {child.pid}) {text}")
    assert exit_status == status
    assert [claim(memory), claim(memory)] == [True, False]
    child.communicate()
    assert not Path(f"/proc/{child.pid}").exists()
    assert describe_death(1, child.pid, memory)[0].startswith(f"rank 1 (process {child.pid}) died in step 7")


def test_sandbox_without_memfd_has_no_shared_activity(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    monkeypatch.setattr("pipeline.mpi.activity._memory", None)
    assert share() == -1
