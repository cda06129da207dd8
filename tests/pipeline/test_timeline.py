"""Trace files are read as they were written, and follow the Trace Event Format."""

import json

import pytest

from pipeline.schedule import ActionKind, zero_bubble_h1
from pipeline.simulate import simulate
from pipeline.timeline import EVENT_COLOURS, WAIT, read_trace, write_trace


def test_written_trace_can_be_read(tmp_path):
    timeline = simulate(zero_bubble_h1(3, 12), {kind: [1.0, 2.0, 3.0] for kind in ActionKind}, transfer=0.25)
    write_trace(timeline, tmp_path / "trace.json")
    spans = read_trace(tmp_path / "trace.json").spans
    assert len(spans) == 3
    for a, b in zip(spans, timeline.spans, strict=True):
        assert [x[0] for x in a] == [x[0] for x in b]
        assert [x[1:] for x in a] == [pytest.approx(x[1:]) for x in b]


def test_events(tmp_path):
    write_trace(simulate(zero_bubble_h1(2, 10), {kind: [1.0, 1.0] for kind in ActionKind}), tmp_path / "t.json", "name")
    process, track, *events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert process == {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "name"}}
    assert track == {"ph": "M", "pid": 0, "tid": 0, "name": "thread_name", "args": {"name": "rank 0"}}
    assert events[2] == {"ph": "X", "pid": 0, "tid": 0, "name": WAIT, "ts": 2e6, "dur": 1e6, "cname": "grey"}
    first, second = next(e for e in events if e["name"] == "F1.0"), next(e for e in events if e["name"] == "W1.9")
    assert first["args"] == {"kind": "F", "stage": 1, "microbatch": 0}
    assert first["cname"] == second["cname"] == EVENT_COLOURS[0]
