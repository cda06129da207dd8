"""A timeline as a file of trace events, which chrome://tracing and ui.perfetto.dev show: a track per rank.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU describes the format. Simulated and
measured timelines are written alike: what is no action is waiting.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.schedule import Action, Kind
from pipeline.simulate import Timeline

WAIT = "wait"
# Names that the format reserves for colours; a micro-batch keeps its own through all stages.
COLOURS = (
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


def write_trace(timeline: Timeline, path: Path, title: str = "pipeline") -> None:
    """Write a timeline in seconds. OSError where the path cannot be written."""
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": title}}]
    for rank, spans in enumerate(timeline.spans):
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}})
        clock = 0.0
        for action, start, end in spans:
            if start > clock:
                events.append(_event(rank, WAIT, clock, start, cname="grey"))
            kind, stage, microbatch = action
            arguments = {"kind": str(kind), "stage": stage, "microbatch": microbatch}
            colour = COLOURS[microbatch % len(COLOURS)]
            events.append(_event(rank, str(action), start, end, cname=colour, args=arguments))
            clock = end
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def read_trace(path: Path) -> Timeline:
    """The timeline that `write_trace` wrote."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    ranks = sum(event["name"] == "thread_name" for event in events)
    spans: list[list[tuple[Action, float, float]]] = [[] for _ in range(ranks)]
    for event in events:
        if event["ph"] == "X" and event["name"] != WAIT:
            of = event["args"]
            action = Action(Kind(of["kind"]), of["stage"], of["microbatch"])
            spans[event["tid"]].append((action, event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6))
    return Timeline(tuple(map(tuple, spans)), ())


def _event(rank: int, name: str, start: float, end: float, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "pid": 0, "tid": rank, "name": name, "ts": start * 1e6, "dur": (end - start) * 1e6, **more}
