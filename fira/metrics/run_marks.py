"""The steps at which a run was continued, from its events, for pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fira.metrics.plot_style import GREY, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NARROW = 0.04  # of a panel's width; marks that are closer have one label


class Mark(NamedTuple):
    """step: the last one before the mark. label: what happened."""

    step: int
    label: str


def marks_of(events: Iterable[Mapping[str, Any]]) -> list[Mark]:
    """The resumes and rollbacks that are part of the log, in order of their steps, with the new layout if it differs.

    Marks of steps that were repeated later are left out.
    """
    marks: list[Mark] = []
    layout = None
    for event in events:
        step = event.get("step")
        if event["event"] not in ("train", "rollback") or not isinstance(step, int):
            continue
        label = event["event"]
        marks = [mark for mark in marks if mark.step <= step]
        if label == "train":
            new = str(event.get("layout")).removesuffix(" (ep 1)")
            label, layout = "resumed" if layout in (None, new) else f"resumed, {new}", new
        if step > 0:
            marks.append(Mark(step, label))
    return marks


def draw_marks(axes: Axes, marks: Sequence[Mark], labelled: bool = False) -> None:
    """Draw vertical lines at the marks. Call it after the lines of the panel, whose width labels depend on."""
    left, right = axes.get_xlim()
    free = left
    for mark in marks:
        axes.axvline(mark.step + 0.5, color=GREY, linestyle=(0, (1, 2)), linewidth=1, zorder=1)
        if labelled and mark.step >= free:
            free = mark.step + NARROW * (right - left)
            place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "rotation": 90, "va": "top", "ha": "left"}
            axes.text(mark.step + 0.5, 0.98, mark.label, color=INK, fontsize=8, **place)
    axes.set_xlim(left, right)
