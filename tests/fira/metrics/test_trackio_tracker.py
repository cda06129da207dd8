"""Trackio's database has what was tracked, in one run."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fira.metrics.tracked_run import EXPERTS, LOSSES
from tests.launch import ROOT, inherited

pytest.importorskip("trackio")


def test_numbers_texts_and_pictures_are_read_back(tmp_path: Path) -> None:
    """In a process of its own, since trackio chooses its folder when it is imported."""
    code = "import sys; from pathlib import Path; from tests.fira.metrics.tracked_run import track\n"
    code += "print(track('trackio', Path(sys.argv[1])))"
    environment = inherited() | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "['trackio show --project fira']\n"

    name = json.loads((tmp_path / "run" / "tracking.json").read_text())["run"]
    with sqlite3.connect(tmp_path / "trackio" / "fira.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        (config,) = database.execute("select config from configs").fetchone()
    assert {run for run, _, _ in rows} == {name}
    found: dict[str, dict[int, object]] = {}
    for _, step, metrics in rows:
        for key, value in json.loads(metrics).items():
            found.setdefault(key, {})[step] = value
    assert found["train_loss"] == LOSSES
    assert found["val_loss"] == {0: 7.5, 2: 3.5}
    assert {key: found[key][4] for key in EXPERTS} == EXPERTS
    assert "def " in json.dumps(found["samples"][2])
    assert "training_progress" in found
    assert json.loads(config)["lr"] == 0.006
