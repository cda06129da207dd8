"""A recorded step is the schedule's, on every stage."""

from pipeline.schedule import SCHEDULES
from pipeline.timeline import read_trace


def test_trace_matches_the_schedule(uninterrupted):
    timeline = read_trace(uninterrupted.parent / "trace.json")
    assert (
        tuple(tuple(action for action, _, _ in spans) for spans in timeline.spans)
        == SCHEDULES["1f1b"].builder(4, 3).actions
    )
    for spans in timeline.spans:
        edges = [edge for _, start, end in spans for edge in (start, end)]
        assert edges == sorted(edges)
        assert 0 < edges[0] < edges[-1] < 60
    assert (uninterrupted.parent / "trace.png").read_bytes().startswith(b"\x89PNG")
