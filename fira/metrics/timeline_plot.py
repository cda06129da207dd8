"""Plots of timelines: a row per rank, a colour per kind of action, labelled with the micro-batch number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from textwrap import fill
from typing import TYPE_CHECKING

from fira.errors import UserError
from fira.metrics.plot_style import save_png
from pipeline.schedule import ActionKind
from pipeline.simulate import Timeline
from pipeline.timeline import Phase, write_trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Light enough for black numbers and distinguishable with colour blindness. The two shades of a kind alternate from
# micro-batch to micro-batch, so that adjacent actions of one kind can be distinguished.
ACTION_COLOURS = {
    ActionKind.FORWARD: ("#9ecae1", "#c6dbef"),
    ActionKind.BACKWARD: ("#fdae6b", "#fdd0a2"),
    ActionKind.BACKWARD_INPUT: ("#fed976", "#ffeda0"),
    ActionKind.BACKWARD_WEIGHT: ("#a1d99b", "#c7e9c0"),
}
LABELS = {
    ActionKind.FORWARD: "forward",
    ActionKind.BACKWARD: "backward",
    ActionKind.BACKWARD_INPUT: "gradient of the input",
    ActionKind.BACKWARD_WEIGHT: "gradients of the weights",
}
PHASE_COLOURS = ("#bcbddc", "#bdbdbd")  # of the names of phases, in the order of their first occurrence
TITLE_WIDTH = 160  # characters
MAX_NUMBERED = 400  # spans in a row; with more, numbers are too small to read


def draw_timelines(
    panels: Mapping[str, Timeline],
    out: Path,
    columns: int = 1,
    phases: Sequence[Phase] = (),
    rows: Sequence[str] | None = None,
) -> None:
    """Draw timelines, in seconds, by title into a PNG with a common time axis.

    phases: of the first timeline. rows: names of the rows of all timelines; default: "rank 0", "rank 1", ….
    Raises UserError if the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lines = -(-len(panels) // columns)
    wrapped = max(len(title) // TITLE_WIDTH for title in panels)
    height = 0.9 + lines * (0.75 + 0.17 * wrapped + 0.36 * max(len(timeline.spans) for timeline in panels.values()))
    figure = Figure(figsize=(13, min(height, 30)), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, squeeze=False)
    for axes, (title, timeline) in zip(grid.flat, panels.items(), strict=False):
        _draw(axes, title, timeline, rows)
    colours = dict(zip(dict.fromkeys(phase.name for phase in phases), PHASE_COLOURS, strict=False))
    for rank, name, start, end in phases:
        _bar(grid[0, 0], rank, start, end, colours[name])
    ends = [*(timeline.length for timeline in panels.values()), *(phase.end for phase in phases)]
    grid[0, 0].set_xlim(0, 1.02e3 * max(ends))  # shared by all panels
    for axes in grid[-1]:
        axes.set_xlabel("milliseconds", fontsize=9)
    kinds = {action.kind for timeline in panels.values() for spans in timeline.spans for action, _, _ in spans}
    patches = [Patch(color=ACTION_COLOURS[kind][0], label=LABELS[kind]) for kind in LABELS if kind in kinds]
    patches += [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    save_png(figure, out)


def _bar(axes: Axes, row: int, start: float, end: float, colour: str) -> None:
    axes.barh(row, (end - start) * 1e3, left=start * 1e3, height=0.86, color=colour, edgecolor="white", lw=0.4)


def _draw(axes: Axes, title: str, timeline: Timeline, rows: Sequence[str] | None) -> None:
    for rank, spans in enumerate(timeline.spans):
        for action, start, end in spans:
            shade = ACTION_COLOURS[action.kind][action.microbatch % 2]
            _bar(axes, rank, start, end, shade)
            if len(spans) <= MAX_NUMBERED and end - start > timeline.length / 120:
                middle = (start + end) / 2 * 1e3
                axes.text(middle, rank, str(action.microbatch), ha="center", va="center", fontsize=7)
    axes.set_title(fill(title, TITLE_WIDTH), fontsize=10, loc="left")
    names = rows or [f"rank {rank}" for rank in range(len(timeline.spans))]
    axes.set_yticks(range(len(timeline.spans)), names, fontsize=8)
    axes.set_ylim(len(timeline.spans) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def write_timeline(
    timeline: Timeline, out: str, title: str, phases: Sequence[Phase] = (), rows: Sequence[str] | None = None
) -> Path:
    """Write a timeline as a trace file, and as a PNG next to it; returns the path of the PNG.

    phases, rows: see `draw_timelines`. Raises UserError if a file cannot be written.
    """
    path = Path(out)
    picture = path.with_suffix(".png")
    with _errors_of(out):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_trace(timeline, path, title, phases)
    draw_timelines({title: timeline}, picture, phases=phases, rows=rows)
    return picture


def check_writable(out: str) -> None:
    """Raise UserError if `write_timeline` could not write to `out`. Creates its folder, and changes no file."""
    path = Path(out)
    with _errors_of(out):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b") if path.exists() else TemporaryFile(dir=path.parent):
            pass


@contextmanager
def _errors_of(out: str) -> Iterator[None]:
    """Context manager that raises an OSError as a UserError that names the path `out`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; choose a path that can be written") from None
