"""The marker of a finished run."""

import json
from datetime import datetime
from pathlib import Path

from fira.training.finish_marker import FINISHED, mark_finished, remove_marker


def test_the_marker_names_step_and_time(tmp_path: Path):
    mark_finished(tmp_path, 200)
    content = json.loads((tmp_path / FINISHED).read_text())
    assert content["step"] == 200
    assert datetime.fromisoformat(content["time"]).tzinfo is not None
    assert [path.name for path in tmp_path.iterdir()] == [FINISHED]


def test_removing_a_marker_twice(tmp_path: Path):
    mark_finished(tmp_path, 1)
    remove_marker(tmp_path)
    remove_marker(tmp_path)
    assert not (tmp_path / FINISHED).exists()
