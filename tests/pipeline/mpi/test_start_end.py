"""Jobs start without a port, a host name or an environment, and end without leaving anything behind."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.launch import ROOT, members, mpirun

ENDS = ROOT / "tests/ranks/hang_ends.py"
FAILURE = range(1, 256)
WAYS = {  # a function of hang_ends.py: the job's status, and what it prints
    "returned": ([0], ""),
    "destroyed": ([0], ""),
    "thread": ([1], "rank 1 failed:"),
    "badly_timed": ([2], "PIPELINE_MPI_TIMEOUT_S must be a positive number of seconds, not abc\n"),
    "exited": ([3], ""),
    "hard_exited": (FAILURE, ""),
    "hard_exited_with_0": ([0, *FAILURE], ""),  # MPICH's mpirun kills the others, and may call that a success
    "killed": (FAILURE, ""),
}
pytestmark = pytest.mark.timeout(180)


class Job:
    """A job that has ended by itself: its status, what it printed, and the processes that were left 5 s later."""

    def __init__(self, way: str, ranks: int, *within: str) -> None:
        command = [*within, mpirun(), "-np", str(ranks), sys.executable, ENDS, way]
        with (
            tempfile.TemporaryFile("w+") as out,
            tempfile.TemporaryFile("w+") as err,
            tempfile.TemporaryDirectory() as folder,
        ):
            environment = os.environ | {"PYTHONPATH": str(ROOT), "PIPELINE_MPI_HANG_DIR": folder}
            process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
            try:
                self.status = process.wait(60)
                self.left = _left_of(process.pid)
            finally:
                for pid in members(process.pid):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
            self.output, self.error = [(file.seek(0), file.read())[1] for file in (out, err)]


def _left_of(session: int) -> list[int]:
    for _ in range(50):
        if not members(session):
            break
        time.sleep(0.1)
    return members(session)


@pytest.fixture(scope="module")
def jobs() -> Iterator[dict[tuple[str, int], Future[Job]]]:
    """Several jobs at a time, on one host: they do not disturb each other."""
    pool = ThreadPoolExecutor(3)
    yield {(way, ranks): pool.submit(Job, way, ranks) for way in WAYS for ranks in (2, 4)}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_end(way: str, ranks: int, jobs: dict[tuple[str, int], Future[Job]]) -> None:
    job, (statuses, error) = jobs[way, ranks].result(), WAYS[way]
    assert not job.left
    assert job.status in statuses, job.error
    assert job.error.count(error) == 1 if error else "Traceback" not in job.error, job.error
    assert statuses != [0] or not job.error


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_job_has_a_world_of_its_own(ranks: int, jobs: dict[tuple[str, int], Future[Job]]) -> None:
    for way in ("returned", "destroyed"):
        assert jobs[way, ranks].result().output.split() == ["sum", str(sum(range(ranks)))] * ranks


def test_without_any_network_and_with_a_name_nobody_knows() -> None:
    isolated = [
        "unshare",
        "--net",
        "--uts",
        "sh",
        "-c",
        'echo nobody-knows > /proc/sys/kernel/hostname; exec "$@"',
        "-",
    ]
    if not shutil.which("unshare") or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("this user may not make namespaces")
    job = Job("returned", 2, *isolated)
    assert job.status == 0, job.error
    assert job.output.split() == ["sum", "1"] * 2
