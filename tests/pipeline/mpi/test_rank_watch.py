"""Hanging jobs: one report is printed, every rank's last operations are written, and the job ends."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launch import ROOT, is_mpich, mpirun, run_ranks

TIMEOUT_S = 3.0
pytestmark = pytest.mark.timeout(180)

JOBS = {  # function of hang_ranks.py: texts that the report must contain, in this order
    "skipped_collective": [
        "rank 0 has waited 3 s in all_to_all_single and ends the job",
        "rank 0 waits in all_to_all_single #1 (group ep of ranks 0, 1; 4×1024 float32), hang_ranks.py:22",
        "rank 1 never entered all_to_all_single #1 (group ep of ranks 0, 1; 4×1024 float32)",
        "its last operation was recv #1 from rank 0, tag 0, hang_ranks.py:20, finished",
        "it is now at hang_ranks.py:21 in skipped_collective",
        "look first at rank 1",
        "every rank's last 256 operations and stacks: ",
    ],
    "computing": ["rank 1 never entered barrier #1", "it is now at hang_ranks.py:", "in computing"],
    "finished": ["rank 1 never entered all_reduce #1", "its script has ended", "look first at rank 1"],
    "wrong_shape": [
        "the sizes of #1 in group default_pg of ranks 0, 1 differ: ",
        "rank 0 called all_reduce of 8 float32",
        "rank 1 called all_reduce of 4 float32",
    ],
    "wrong_order": [
        "the operations of #1 in group default_pg of ranks 0, 1 differ: ",
        "rank 0 called broadcast with root 0 of 4 float32",
        "rank 1 called all_reduce of 4 float32",
        "(the order differs)",
    ],
    "receive_without_send": [
        "rank 0 waits in recv #1 from rank 1, tag 5",
        "rank 1 never sent it; it waits in barrier #1",
    ],
    "no_new_group": ["rank 0 waits in new_group #2", "rank 1 never entered new_group #2"],
    "incomplete_future": ["rank 0 waits in all_reduce #1", "rank 1 never entered all_reduce #1"],
    "stopped": ["rank 0 waits in barrier #1", "rank 1 did not answer: its process", "is stopped (SIGSTOP)"],
    "stopped_first": ["rank 1 waits in barrier #1", "rank 0 did not answer: its process", "is stopped (SIGSTOP)"],
    "exit_awaited": [
        "rank 0 has waited 3 s in exit and ends the job",
        "rank 0 waits in exit #1 (group exit of ranks 0, 1), at the end of the script",
        "rank 1 never entered exit #1",
        "it is now at hang_ranks.py:",
        "look first at rank 1",
    ],
    "long_activity_idle": [
        "rank 0 has waited 3 s in barrier and ends the job",
        "rank 0 waits in barrier #1",
        "in long_activity_idle, in data preparation",
    ],
    "long_activity_stopped": ["rank 0 waits in barrier #1", "is stopped (SIGSTOP); it was in data preparation"],
    "raised": ["rank 1 failed:", "no more data", "rank 0 waits in barrier #2"],
}
FIRST = ["skipped_collective", "wrong_order", "finished", "stopped", "raised"]  # the tests of the others are slow


class Job:
    """A finished job of ``hang_ranks.py``: exit status, stderr and the files of its report."""

    def __init__(
        self, name: str, folder: Path, timeout_s: float = TIMEOUT_S, within: Sequence[str] = (), **env: str
    ) -> None:
        env |= {"PIPELINE_MPI_TIMEOUT_S": str(timeout_s), "PIPELINE_MPI_HANG_DIR": str(folder)}
        result = run_ranks(2, ROOT / "tests/ranks/hang_ranks.py", name, timeout=90, env=env, within=within)
        self.status, self.error = result.returncode, result.stderr
        self.files = {file.name: file for file in folder.glob("*/*")}

    def expect(self, *texts: str) -> None:
        """Assert that there is one report and that it contains all texts in this order."""
        assert self.error.count("pipeline: ") == 1, self.error
        position = 0
        for text in texts:
            position = self.error.find(text, position)
            assert position >= 0, f"missing {text!r} in: {self.error}"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Job]]]:
    """Run several of the first jobs at a time, because they mostly wait."""
    pool = ThreadPoolExecutor(3)
    yield {name: pool.submit(Job, name, tmp_path_factory.mktemp(name)) for name in FIRST}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", FIRST)
def test_report_describes_the_cause_and_job_ends(name: str, jobs: dict[str, Future[Job]]) -> None:
    job = jobs[name].result()
    job.expect(*JOBS[name])
    assert job.status == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in JOBS if name not in FIRST])
def test_report_describes_further_causes_and_job_ends(name: str, tmp_path: Path) -> None:
    job = Job(name, tmp_path)
    job.expect(*JOBS[name])
    assert job.status == 1


def test_every_answering_rank_writes_its_trace(jobs: dict[str, Future[Job]]) -> None:
    files = jobs["skipped_collective"].result().files
    trace_0, trace_1 = (json.loads(files[f"rank-{rank}.json"].read_text()) for rank in (0, 1))
    waiting = trace_0["operations"][-1]
    assert (waiting["operation"], waiting["shape"], waiting["finished"]) == ("all_to_all_single", [4, 1024], None)
    assert waiting["waited_s"] >= TIMEOUT_S
    assert files["report.txt"].stat().st_mtime - waiting["started"] < TIMEOUT_S + 10
    assert trace_1["operations"][-1]["operation"] == "recv"
    assert any("hang_ranks.py:21" in call for call in trace_1["stacks"]["MainThread"])
    assert "rank-1.json" not in jobs["stopped"].result().files


def test_killed_rank_is_reported(tmp_path: Path) -> None:
    job = Job("killed", tmp_path)
    assert job.status not in (0, 2)
    if is_mpich():  # Open MPI's mpirun ends the job at once, and names the rank itself
        job.expect("pipeline: rank 1 (process ", ") was killed by SIGKILL", " in waiting for rank 0; the job ends")


@pytest.mark.slow
def test_long_activity_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    job = Job("long_activity", tmp_path)
    assert (job.status, job.error) == (0, "")


@pytest.mark.slow
def test_dead_rank_is_reported_if_mpirun_ignores_it(tmp_path: Path) -> None:
    lenient = ["sh", "-c", 'mpirun=$1; shift; exec "$mpirun" -disable-auto-cleanup "$@"', "-"]
    if "-disable-auto-cleanup" not in subprocess.run([mpirun(), "--help"], capture_output=True, text=True).stdout:
        pytest.skip("only MPICH's mpirun has this option")
    job = Job("gone", tmp_path, timeout_s=600, within=lenient)
    assert ") exited with status 3; the job ends\n  rank 0 waits in barrier #2 " in job.error
    assert job.status != 0


def test_debug_detail_raises_before_mismatched_collective(tmp_path: Path) -> None:
    job = Job("wrong_shape", tmp_path, timeout_s=60, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert job.error.count("ValueError: the sizes of #1 in group default_pg of ranks 0, 1 differ: ") == 1, job.error
    assert "rank 0 called all_reduce of 8 float32, hang_ranks.py:" in job.error
    assert job.status == 1


@pytest.mark.slow
def test_report_on_request_does_not_affect_the_job(tmp_path: Path) -> None:
    job = Job("requested", tmp_path, timeout_s=60)
    job.expect("report requested by SIGUSR2", "rank 1 waits in barrier #2", "rank 0 never entered barrier #2")
    assert job.status == 0
    assert set(job.files) == {"report.txt", "rank-0.json", "rank-1.json"}
