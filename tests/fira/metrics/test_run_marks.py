"""Marks of resumes, changes of the layout, and rollbacks."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fira.metrics.events import EVENTS, EventLog, read_events
from fira.metrics.run_marks import Mark, draw_marks, marks_of, number_marks


def train(step: int, layout: str) -> dict[str, Any]:
    return {"event": "train", "step": step, "layout": layout}


def test_marks_name_new_layouts_and_omit_repeated_steps() -> None:
    events = [
        train(0, "pp 1 × dp 1 (ep 1)"),
        train(30, "pp 1 × dp 1 (ep 1)"),  # in a run that was begun again
        train(0, "pp 4 × dp 1 (ep 1)"),
        {"event": "start", "step": 0},  # of the supervisor
        train(10, "pp 4 × dp 1 (ep 1)"),
        {"event": "rollback", "step": 15},
        train(40, "pp 4 × dp 1 (ep 1)"),  # whose steps were repeated from the earlier checkpoint of step 20
        train(20, "pp 2 × dp 2 (ep 2)"),
    ]
    assert marks_of(events) == [Mark(10, "resumed"), Mark(15, "rollback"), Mark(20, "resumed", "pp 2 × dp 2 (ep 2)")]


def test_events_are_read_while_they_are_written(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    log = EventLog(tmp_path)
    log.append("train", step=3, layout="pp 1 × dp 1 (ep 1)")
    with (tmp_path / EVENTS).open("a") as file:
        file.write('[1]\n{"step": 4}\n{"event": "tra')
    (event,) = read_events(tmp_path)
    assert (event["event"], event["step"]) == ("train", 3)


def test_lines_are_between_steps_and_close_ones_share_a_number() -> None:
    axes = Figure().add_subplot()
    axes.plot([0, 100], [1, 2])
    limits = axes.get_xlim()
    marks = [Mark(10, "resumed", "pp 4 × dp 1"), Mark(11, "resumed", "pp 2 × dp 2"), Mark(13, "rollback")]
    marks += [Mark(60, "resumed", "pp 1 × dp 4"), Mark(70, "rollback"), Mark(70, "resumed")]
    draw_marks(axes, marks)
    descriptions = number_marks(axes, marks)
    assert [line.get_xdata()[0] for line in axes.lines[1:]] == [10.5, 11.5, 13.5, 60.5, 70.5, 70.5]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3"]
    assert descriptions == [
        "1: 2 × resumed, 1 × rollback after steps 10 to 13, last layout pp 2 × dp 2",
        "2: resumed after step 60, layout pp 1 × dp 4",
        "3: 1 × rollback, 1 × resumed after step 70",
    ]
    assert axes.get_xlim() == limits
