"""The steps at which a run was continued, from its events, for pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fira.metrics.plot_style import GREY, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NARROW = 0.04  # of a panel's width; marks that are closer have one label, with the last layout


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
    narrow = NARROW * (right - left)
    for mark in marks:
        axes.axvline(mark.step + 0.5, color=GREY, linestyle=(0, (1, 2)), linewidth=1, zorder=1)
    for group in _groups(marks, narrow) if labelled else []:
        label = group[0].label if len(group) == 1 else f"{len(group)} × {max(group, key=_by_layout).label}"
        side = "right" if group[0].step + narrow > right else "left"
        place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "rotation": 90, "va": "top", "ha": side}
        axes.text(group[0].step + 0.5, 0.98, label, color=INK, fontsize=8, **place)
    axes.set_xlim(left, right)


def _by_layout(mark: Mark) -> tuple[bool, int]:
    """Order of marks by which the last one with a new layout is the largest."""
    return "," in mark.label, mark.step


def _groups(marks: Sequence[Mark], narrow: float) -> list[list[Mark]]:
    """Marks in groups, each of those that are at most `narrow` steps behind its first one."""
    groups: list[list[Mark]] = []
    for mark in marks:
        if groups and mark.step - groups[-1][0].step <= narrow:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    return groups
