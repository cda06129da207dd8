"""The documents of the server: runs that are missing, incomplete, running and finished; other requests."""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fira.errors import UserError
from fira.metrics.csv_log import LOG_NAME, TrainingLog
from fira.metrics.events import EventLog
from fira.training.config import TrainConfig
from fira.training.finish_marker import mark_finished
from fira.training.run_folder import write_settings
from fira.watching.watch_server import FollowedRuns, make_server
from tests.fira.metrics.tracked_run import row


class Client:
    """A client of a server for the folder `runs`."""

    def __init__(self, address: str, runs: Path) -> None:
        self.address, self.runs = address, runs

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """Status, and the document if there is one."""
        request = urllib.request.Request(self.address + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                self.tag = answer.headers["ETag"]
                return answer.status, json.load(answer) if path != "/" else answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    runs = tmp_path / "runs"
    runs.mkdir()
    server = make_server(FollowedRuns([runs]), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield Client(f"http://127.0.0.1:{server.server_address[1]}", runs)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def write_run(folder: Path, steps: int) -> None:
    EventLog(folder).append("train", step=0, ranks=2, layout="pp 2 × dp 1 (ep 1)")
    write_settings(folder, TrainConfig(steps=30), {"unigram": 6.0})
    log = TrainingLog(folder / LOG_NAME)
    for step in range(1, steps + 1):
        log.write(row(step))
    log.close()


def test_runs_appear_run_and_finish(client: Client) -> None:
    assert client.get("/state.json")[1]["runs"] == []
    write_run(client.runs / "a", 3)
    (run,) = client.get("/state.json")[1]["runs"]
    expected = {"name": "a", "state": "running", "step": 3, "steps": 30, "ranks": 2, "baselines": {"unigram": 6.0}}
    assert {name: run[name] for name in expected} == expected
    assert run["curves"]["train_loss"] == [[1, 2, 3], [4.0, 3.0, 2.5]]
    assert run["config"]["model"] == "fira-tiny"
    assert run["remaining_s"] is not None
    long_ago = time.time() - 1000
    os.utime(client.runs / "a" / LOG_NAME, (long_ago, long_ago))
    assert client.get("/state.json")[1]["runs"][-1]["state"] == "stopped"
    mark_finished(client.runs / "a", 3)
    assert client.get("/state.json")[1]["runs"][-1]["state"] == "finished"


def test_damaged_files_leave_the_rest(client: Client) -> None:
    write_run(client.runs / "a", 2)
    for name in ("config.toml", "data.json", "trace.json", "samples.jsonl"):
        (client.runs / "a" / name).write_bytes(b'{"traceEvents": 3}\xff[')
    (client.runs / "a" / "samples.jsonl").write_text('{"step": 1, "prompt": "a", "text": "b"}\n{"st')
    run = client.get("/state.json")[1]["runs"][0]
    assert (run["step"], run["steps"], run["baselines"]) == (2, None, {})
    status, details = client.get(f"/run.json?run={client.runs / 'a'}")
    assert status == 200
    assert details["timeline"] is None
    assert [sample["text"] for sample in details["samples"]] == ["b"]
    assert [event["event"] for event in details["events"]] == ["train"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.toml", "lr = inf\nsteps = 30\ndata = 2026-01-01\n"),
        ("samples.jsonl", '{"step": NaN, "prompt": "a", "text": "b"}\n'),
        ("events.jsonl", '{"event": "train", "step": 0, "loss": NaN}\n'),
        (LOG_NAME, "iter,train_loss,val_loss,lr,mfu\ninf,1,,1,1\nnan,1,,1,1\n"),
    ],
)
def test_values_that_json_cannot_represent_do_not_hide_other_runs(client: Client, name: str, content: str) -> None:
    for folder in ("a", "b"):
        write_run(client.runs / folder, 2)
    (client.runs / "a" / name).write_text(content)
    assert [run["step"] for run in client.get("/state.json")[1]["runs"]] == [0 if name == LOG_NAME else 2, 2]
    assert client.get(f"/run.json?run={client.runs / 'a'}")[0] == 200


def test_diverged_run_shows_its_last_loss_and_runs_of_a_recipe_are_found(client: Client) -> None:
    write_run(client.runs / "recipe" / "base", 2)
    with (client.runs / "recipe" / "base" / LOG_NAME).open("a") as file:
        file.write("3,nan,,0.2\n")
    (run,) = client.get("/state.json")[1]["runs"]
    assert (run["name"], run["latest_loss"], run["curves"]["train_loss"][0]) == ("base", "nan", [1, 2])


def test_unchanged_document_is_not_sent_again(client: Client) -> None:
    write_run(client.runs / "a", 2)
    client.get("/state.json")
    assert client.get(f"/run.json?run={client.runs / 'a'}")[0] == 200
    assert client.get(f"/run.json?run={client.runs / 'a'}", **{"If-None-Match": client.tag}) == (304, "")


def test_page_and_other_requests(client: Client) -> None:
    page = client.get("/")[1]
    assert "<title>Fira runs</title>" in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    for path in ("/../watch_server.py", "/run.json", "/run.json?run=/etc", "/favicon.ico"):
        assert client.get(path)[0] == 404
    assert client.get("/state.json", Host="attacker.example")[0] == 403
    assert client.get("/state.json", Host="localhost:8050")[0] == 200


def test_missing_folder_and_occupied_port_are_errors(client: Client, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder; give run folders"):
        FollowedRuns([tmp_path / "nowhere"])
    port = int(client.address.rpartition(":")[2])
    with pytest.raises(UserError, match=rf"--host 127\.0\.0\.1 --port {port}: .*in use; give another"):
        make_server(FollowedRuns([tmp_path]), "127.0.0.1", port)
