"""Start and end of jobs: no port, host name or environment variable is needed, and no process is left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mpi4py
import pytest

from tests.launch import ROOT, inherited, is_mpich, members, mpirun

ENDS = ROOT / "tests/ranks/hang_ends.py"
FAILURE = range(1, 256)
DIED = "pipeline: rank 1 (process " if is_mpich() else ""  # Open MPI's mpirun names the rank
JOBS = {  # function of hang_ends.py: (allowed exit statuses, expected message)
    "returned": ([0], ""),
    "destroyed": ([0], ""),
    "unresponsive": ([0], ""),
    "thread": ([1], "rank 1 failed:"),
    "badly_timed": ([2], "PIPELINE_MPI_TIMEOUT_S must be a positive number of seconds, not abc\n"),
    "exited": ([3], ""),
    "exited_without_hook": ([1], "pipeline: rank 1 has ended its script while rank "),
    "exited_in_context": ([3], ""),
    "exited_in_thread": ([0], ""),
    "hard_exited": (FAILURE, DIED),
    "hard_exited_with_0": (FAILURE, DIED),
    "killed": (FAILURE, DIED),
    "failed_with_killed": (FAILURE, DIED),
}
pytestmark = pytest.mark.timeout(180)


class Job:
    """A finished job: its exit status, its output, and the processes that are left after 5 s."""

    def __init__(self, name: str, ranks: int, *within: str) -> None:
        command = [*within, mpirun(), "-np", str(ranks), sys.executable, ENDS, name]
        with (
            tempfile.TemporaryFile("w+") as out,
            tempfile.TemporaryFile("w+") as err,
            tempfile.TemporaryDirectory() as folder,
        ):
            environment = inherited() | {"PIPELINE_MPI_HANG_DIR": folder}
            process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
            try:
                self.status = process.wait(60)
                self.left = _remaining(process.pid)
            finally:
                for pid in members(process.pid):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
            self.output, self.error = [(file.seek(0), file.read())[1] for file in (out, err)]


def _remaining(session: int) -> list[int]:
    for _ in range(50):
        if not members(session):
            break
        time.sleep(0.1)
    return members(session)


@pytest.fixture(scope="module")
def jobs(ranks: int) -> Iterator[dict[str, Future[Job]]]:
    """Run several jobs at a time on one host, which must not interfere with each other."""
    pool = ThreadPoolExecutor(3)
    yield {name: pool.submit(Job, name, ranks) for name in JOBS}
    pool.shutdown(cancel_futures=True)


# With three, one rank neither fails nor prints the report.
numbers_of_ranks = pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)], scope="module")


@numbers_of_ranks
@pytest.mark.parametrize("name", JOBS)
def test_job_ends_with_status_and_message(name: str, ranks: int, jobs: dict[str, Future[Job]]) -> None:
    job, (statuses, error) = jobs[name].result(), JOBS[name]
    assert not job.left
    assert job.status in statuses, job.error
    assert job.error.count(error) == 1 if error else "Traceback" not in job.error, job.error
    assert statuses != [0] or not job.error
    assert name != "failed_with_killed" or "rank 0 failed" not in job.error


@pytest.mark.slow
def test_rank_that_ends_before_init_is_named() -> None:
    if not is_mpich():
        pytest.skip("Open MPI's mpirun names the rank")
    job = Job("ended_before_init", 2)
    assert not job.left
    assert job.status in FAILURE
    # The status is not known if mpirun has asked for it first, and the kernel is older than 6.15.
    assert re.search(r"^pipeline: rank 1 \(process \d+\) (exited with status 0|died); the job ends$", job.error, re.M)


@numbers_of_ranks
def test_concurrent_jobs_are_independent(ranks: int, jobs: dict[str, Future[Job]]) -> None:
    for name in ("returned", "destroyed"):
        assert jobs[name].result().output.split() == ["sum", str(sum(range(ranks)))] * ranks


def test_job_runs_without_network_and_with_unknown_host_name() -> None:
    rename = 'echo unknown-host > /proc/sys/kernel/hostname; exec "$@"'
    isolated = ["unshare", "--net", "--uts", "sh", "-c", rename, "-"]
    if not shutil.which("unshare") or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("this user may not create namespaces")
    job = Job("returned", 2, *isolated)
    assert job.status == 0, job.error
    assert job.output.split() == ["sum", "1"] * 2


def test_library_of_a_wheel_is_found_where_python_is_installed_in_usr() -> None:
    """As with the Python of Debian, which installs packages in /usr/local. Kaggle's and Colab's notebooks have it."""
    folder = Path(mpi4py.__file__).parents[3]
    if not list(folder.glob("libmpi.so*")):
        pytest.skip("the MPI library is not that of a wheel")
    code = "sys.prefix = sys.exec_prefix = sys.base_exec_prefix = '/usr'; from pipeline.mpi.probe import main; main()"
    environment = {name: value for name, value in inherited().items() if name != "MPI4PY_LIBMPI"}
    output = subprocess.check_output([sys.executable, "-c", f"import sys; {code}"], env=environment, timeout=60)
    assert Path(json.loads(output)["file"]).parent == folder
