"""The loop of the supervisor, with a launcher that starts no ranks but changes the run folder as a job does."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fira.errors import UserError
from fira.supervisor.supervise import Supervisor
from fira.training.config import TrainConfig

FAKE = Path(__file__).with_name("fake_launcher.py")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short intervals, and the handlers of this process restored after the test."""
    monkeypatch.setattr("fira.supervisor.supervise.HOSTS_S", 0.1)
    monkeypatch.setattr("fira.supervisor.supervise.POLL_S", 0.02)
    monkeypatch.setattr("fira.supervisor.supervise.RESEND_S", 0.2)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def supervisor(folder: Path, *jobs: str, **settings: Any) -> Supervisor:
    """A supervisor of the run folder `folder/run`, whose jobs do what the lines say."""
    (folder / "jobs.txt").write_text("\n".join(jobs))
    launcher = f"{sys.executable} {FAKE} {folder}"
    config = TrainConfig(**{"out": str(folder / "run"), "elastic": "1:4", "launcher": launcher} | settings)
    return Supervisor(config, ["train"], ["--quiet"])


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]


def started(folder: Path) -> list[str]:
    """The arguments of each job, as text; all jobs have the same number of threads per rank."""
    jobs = [json.loads(line) for line in (folder / "started.jsonl").read_text().splitlines()]
    assert {job.pop() for job in jobs} == {"1"}  # tests/conftest.py
    return [" ".join(job) for job in jobs]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def during_run(run: Supervisor, act: Callable[[], None]) -> int:
    """Run the supervisor, and `act` in a thread next to it. Return the exit status."""
    thread = threading.Thread(target=act)
    thread.start()
    try:
        return run.run()
    finally:
        thread.join()


def test_a_crashed_run_is_resumed_until_it_is_finished(tmp_path: Path):
    run = supervisor(tmp_path, "save 10; print pipeline: rank 3 hangs; exit 1", "save 20; exit 0", "save 30; finish")
    assert run.run() == 0
    first, second, third = started(tmp_path)
    assert first.startswith("-n 4 train --")
    assert "--resume" not in first
    assert second == third == first + " --resume auto"
    assert "--micro-batch-size 2" in first
    assert "--quiet" in first
    assert "elastic" not in first
    found = events(tmp_path)
    assert [event["event"] for event in found] == ["start", "exit", "start", "exit", "start", "end"]
    assert [event["step"] for event in found] == [0, 10, 10, 20, 20, 30]
    assert found[0]["layout"] == "chosen by --plan auto"
    assert (found[1]["cause"], found[1]["rank"], found[1]["status"]) == ("rank 3 hangs", 3, 1)


def test_status_2_is_not_restarted(tmp_path: Path):
    assert supervisor(tmp_path, "exit 2").run() == 2
    assert len(started(tmp_path)) == 1
    assert events(tmp_path)[-1]["status"] == 2


def test_the_run_ends_after_restarts_without_progress(tmp_path: Path):
    run = supervisor(tmp_path, "save 10; exit 1", "save 20; exit 1", *["exit 1"] * 3, max_restarts=2)
    assert run.run() == 1
    assert len(started(tmp_path)) == 4
    assert [event["restarts_without_progress"] for event in events(tmp_path) if event["event"] == "start"] == [
        0,
        1,
        1,
        2,
    ]


def test_a_marker_of_an_earlier_run_does_not_count(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finished.json").write_text("{}")
    assert supervisor(tmp_path, "exit 0", max_restarts=0).run() == 1


@pytest.mark.parametrize(
    ("given", "jobs", "resumed"),
    [
        (None, ["exit 1", "finish"], None),  # nothing has been written
        ("runs/a", ["exit 1", "finish"], "runs/a"),  # no checkpoint has been written
        ("runs/a", ["save 3; exit 1", "finish"], "auto"),
        ("auto", ["exit 1", "finish"], "auto"),
    ],
)
def test_the_given_checkpoint_is_used_until_there_is_a_newer_one(tmp_path: Path, given, jobs, resumed):
    assert supervisor(tmp_path, *jobs, resume=given).run() == 0
    second = started(tmp_path)[1]
    assert second.endswith(f" --resume {resumed}") if resumed else "--resume" not in second


def test_the_run_follows_the_hosts(tmp_path: Path):
    """4 slots, 1 slot, no slot, 3 slots. More ranks are used after a checkpoint; fewer at once, with a checkpoint."""
    hosts = tmp_path / "hosts"
    hosts.write_text("node1:2\nnode2:2\n")
    jobs = ["train 10", "save 20; train 25", "save 30; train 40", "finish"]
    run = supervisor(tmp_path, *jobs, hosts=str(hosts), elastic="1:4")

    def write(text: str) -> None:
        """At once: between truncating and writing, the file would have no hosts."""
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(hosts)

    def change_hosts() -> None:
        until(lambda: (tmp_path / "run" / "training_log.csv").exists())
        write("node2:1\n")
        until(lambda: "step-000020" in (tmp_path / "run" / "checkpoints" / "latest").read_text())
        write("")
        until(lambda: any(event["event"] == "wait" for event in events(tmp_path)))
        write("node1:2\n")
        until(lambda: "step-000030" in (tmp_path / "run" / "checkpoints" / "latest").read_text())
        write("node1:2\nnode3:1\n")

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("")
    assert during_run(run, change_hosts) == 0
    placements = [event["hosts"] for event in events(tmp_path) if event["event"] == "start"]
    assert placements == [{"node1": 2, "node2": 2}, {"node2": 1}, {"node1": 2}, {"node1": 2, "node3": 1}]
    assert [line.split(" train ")[0] for line in started(tmp_path)][3] == "--host node1:2,node3:1 -n 3"
    causes = [event["cause"] for event in events(tmp_path) if event["event"] == "stop"]
    removed = ["--hosts has lost node1, node2 (1 of 2 slots)", "--hosts has lost node2"]
    assert causes == [*removed, "3 instead of 2 ranks are possible"]
    assert events(tmp_path)[-1]["step"] == 40


def test_unreadable_hosts_are_ignored_while_the_run_continues(tmp_path: Path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node1:2\n")
    run = supervisor(tmp_path, "save 10; exit 1", "finish", hosts=str(hosts))
    hosts.unlink()
    assert run.run() == 0
    assert [event["ranks"] for event in events(tmp_path) if event["event"] == "start"] == [2, 2]


@pytest.mark.parametrize(
    ("number", "status", "step"), [(signal.SIGINT, 130, 0), (signal.SIGTERM, 0, 7), (signal.SIGHUP, 0, 7)]
)
def test_signals_end_the_run(tmp_path: Path, number: int, status: int, step: int):
    """SIGINT ends it at once, the others after a checkpoint."""
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup, which ignores it

    def send() -> None:
        until(lambda: (tmp_path / "run" / "training_log.csv").exists())
        os.kill(os.getpid(), number)

    assert during_run(supervisor(tmp_path, "train 7"), send) == status
    assert events(tmp_path)[-1]["step"] == step
    assert events(tmp_path)[-1]["cause"] == signal.Signals(number).name


def test_nohup_protects_from_sighup(tmp_path: Path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def send() -> None:
        until(lambda: (tmp_path / "started.jsonl").exists())
        os.kill(os.getpid(), signal.SIGHUP)

    assert during_run(supervisor(tmp_path, "exit 0", "finish"), send) == 0
    assert len(started(tmp_path)) == 2


def test_the_run_folder_must_be_named():
    with pytest.raises(UserError, match="need --out"):
        Supervisor(TrainConfig(elastic="1:2"), ["train"], [])


def test_a_request_for_a_checkpoint_is_passed_on_when_the_job_trains(tmp_path: Path):
    run = supervisor(tmp_path, "train 10")
    latest = tmp_path / "run" / "checkpoints" / "latest"

    def act() -> None:
        until(latest.exists)
        os.kill(os.getpid(), signal.SIGINT)

    os.kill(os.getpid(), signal.SIGUSR1)
    assert during_run(run, act) == 130
    assert latest.exists()
