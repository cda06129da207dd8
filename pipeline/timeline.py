"""Write and read timelines, simulated or measured, as trace files for chrome://tracing and ui.perfetto.dev.

The file is in the Trace Event Format, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU,
with one track per rank. The time between two actions of a rank becomes an event named "wait".
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.schedule import Action, ActionKind
from pipeline.simulate import Timeline

WAIT = "wait"
EVENT_COLOURS = (  # colour names that the format defines; a micro-batch has the same colour in all stages
    "good",
    "bad",
    "terrible",
    "rail_response",
    "rail_animation",
    "rail_idle",
    "cq_build_passed",
    "yellow",
    "olive",
)


class Phase(NamedTuple):
    """A part of a step that is not an action of the schedule, such as the optimizer. rank: row of the timeline."""

    rank: int
    name: str
    start: float
    end: float


def write_trace(timeline: Timeline, path: Path, title: str = "pipeline", phases: Sequence[Phase] = ()) -> None:
    """Write a timeline and phases after it, in seconds. Raises OSError when the path is not writable."""
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": title}}]
    for rank, spans in enumerate(timeline.spans):
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}})
        clock = 0.0
        for action, start, end in spans:
            if start > clock:
                events.append(_event(rank, WAIT, clock, start, cname="grey"))
            kind, stage, microbatch = action
            arguments = {"kind": str(kind), "stage": stage, "microbatch": microbatch}
            colour = EVENT_COLOURS[microbatch % len(EVENT_COLOURS)]
            events.append(_event(rank, str(action), start, end, cname=colour, args=arguments))
            clock = end
    events += [_event(rank, name, start, end) for rank, name, start, end in phases]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def read_trace(path: Path) -> Timeline:
    """Read a timeline that `write_trace` wrote, without its phases."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    ranks = sum(event["name"] == "thread_name" for event in events)
    spans: list[list[tuple[Action, float, float]]] = [[] for _ in range(ranks)]
    for event in events:
        if event["ph"] == "X" and "kind" in event.get("args", {}):
            arguments = event["args"]
            action = Action(ActionKind(arguments["kind"]), arguments["stage"], arguments["microbatch"])
            spans[event["tid"]].append((action, event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6))
    return Timeline(tuple(map(tuple, spans)))


def _event(rank: int, name: str, start: float, end: float, **fields: Any) -> dict[str, Any]:
    """A complete event; the format's times are in microseconds."""
    return {"ph": "X", "pid": 0, "tid": rank, "name": name, "ts": start * 1e6, "dur": (end - start) * 1e6, **fields}
