"""Timelines as trace files and plots."""

import json
from collections import Counter
from itertools import pairwise

import pytest

from fira.errors import UserError
from fira.metrics.timeline_plot import draw_timelines, write_timeline
from pipeline.schedule import ActionKind, gpipe, zero_bubble_h1
from pipeline.simulate import simulate
from pipeline.timeline import Phase, read_trace


def unit(stages: int) -> dict[ActionKind, list[float]]:
    """Actions of one second, backwards of two."""
    return {kind: [2.0 if kind is ActionKind.BACKWARD else 1.0] * stages for kind in ActionKind}


def test_written_trace_contains_the_action_lists(tmp_path):
    schedule = zero_bubble_h1(3, 5)
    timeline = simulate(schedule, unit(3), transfer=0.25)
    picture = write_timeline(timeline, str(tmp_path / "deep" / "out.json"), "simulated")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    path = tmp_path / "deep" / "out.json"
    read = read_trace(path)
    assert tuple(tuple(action for action, _, _ in spans) for spans in read.spans) == schedule.actions
    assert read.length == pytest.approx(timeline.length)
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    for rank, spans in enumerate(timeline.spans):  # neither gaps nor overlaps: time without an action is a wait
        row = [event for event in events if event["tid"] == rank]
        assert sum(event["dur"] for event in row) == pytest.approx(spans[-1][2] * 1e6)
        assert all(a["ts"] + a["dur"] == pytest.approx(b["ts"]) for a, b in pairwise(row))
    assert Counter(event["name"] == "wait" for event in events)[False] == sum(map(len, schedule.actions))


def test_path_that_cannot_be_written_raises():
    with pytest.raises(UserError, match="choose a path"):
        write_timeline(simulate(gpipe(2, 2), unit(2)), "/dev/null/out.json", "nowhere")


def test_panels_share_an_axis_that_contains_the_longest_timeline(tmp_path, monkeypatch):
    panels = {"short": simulate(gpipe(2, 2), unit(2)), "long": simulate(gpipe(2, 9), unit(2))}
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    draw_timelines(panels, tmp_path / "both.png", columns=2)
    assert all(axes.get_xlim()[1] >= panels["long"].length * 1e3 for axes in figures[0].axes)


def test_long_title_is_wrapped(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    for count in (1, 20):
        draw_timelines({"--model rish-base --pp 8 " * count: simulate(gpipe(2, 2), unit(2))}, tmp_path / "p.png")
        figures[-1].draw_without_rendering()
        box = figures[-1].get_tightbbox()  # in inches
        assert box.x1 <= figures[-1].get_figwidth()
        assert box.y1 <= figures[-1].get_figheight()
    assert figures[1].get_figheight() > figures[0].get_figheight()


def test_phases_are_drawn_after_the_actions_and_left_out_when_a_trace_is_read(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    timeline = simulate(gpipe(2, 2), unit(2))
    phases = [Phase(0, "gradient reduction", 9.0, 11.0), Phase(1, "optimizer", 11.0, 12.0)]
    write_timeline(timeline, str(tmp_path / "step.json"), "step", phases, ["ranks 0–3", "ranks 4–7"])
    (axes,) = figures[0].axes
    bars = {(bar.get_x(), bar.get_width()): round(bar.get_y() + bar.get_height() / 2) for bar in axes.patches}
    assert (bars[9000.0, 2000.0], bars[11000.0, 1000.0]) == (0, 1)
    assert axes.get_xlim()[1] >= 12_000
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ranks 0–3", "ranks 4–7"]
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["forward", "backward", "gradient reduction", "optimizer"]
    assert read_trace(tmp_path / "step.json") == timeline
    names = {event["name"] for event in json.loads((tmp_path / "step.json").read_text())["traceEvents"]}
    assert {"gradient reduction", "optimizer"} <= names
