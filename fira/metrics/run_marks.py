"""The steps at which a run was continued, from its events, for pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fira.metrics.plot_style import GREY, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NARROW = 0.04  # of a panel's width; marks that are closer share a number
MARK_LINE: dict[str, Any] = {"color": GREY, "linestyle": (0, (1, 2)), "linewidth": 1}
STRIP = 0.08  # of a panel's height; where the numbers are, above all curves


class Mark(NamedTuple):
    """step: the last one before the mark. kind: resumed or rollback. layout: the new one, if it differs."""

    step: int
    kind: str
    layout: str = ""


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
        marks = [mark for mark in marks if mark.step <= step]
        kind, changed = "rollback", ""
        if event["event"] == "train":
            new = str(event.get("layout")).removesuffix(" (ep 1)")
            kind, changed, layout = "resumed", "" if layout in (None, new) else new, new
        if step > 0:
            marks.append(Mark(step, kind, changed))
    return marks


def draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    """Draw vertical lines at the marks. Call it after the lines of the panel, whose width remains."""
    limits = axes.get_xlim()
    for mark in marks:
        axes.axvline(mark.step + 0.5, **MARK_LINE, zorder=1)
    axes.set_xlim(limits)


def number_marks(axes: Axes, marks: Sequence[Mark]) -> list[str]:
    """Number the marks in a strip that is added above the curves, and return a description of each number.

    Call it after the lines of the panel.
    """
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    if marks:
        axes.set_ylim(bottom, top + STRIP * (top - bottom))
    groups = _groups(marks, NARROW * (right - left))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top", "bbox": box}
    for number, group in enumerate(groups, 1):
        axes.text(group[0].step + 0.5, 0.99, str(number), color=INK, fontsize=8, **place)
    return [f"{number}: {_description(group)}" for number, group in enumerate(groups, 1)]


def _description(group: Sequence[Mark]) -> str:
    """What happened at adjacent marks, after which steps, and the last layout if it has changed."""
    kinds = Counter(mark.kind for mark in group)
    text = ", ".join(kind if len(group) == 1 else f"{count} × {kind}" for kind, count in kinds.items())
    steps = [f"{step:,}" for step in dict.fromkeys((group[0].step, group[-1].step))]
    text += f" after step {steps[0]}" if len(steps) == 1 else f" after steps {steps[0]} to {steps[1]}"
    layouts = [mark.layout for mark in group if mark.layout]
    return f"{text}, {'last ' * (len(layouts) > 1)}layout {layouts[-1]}" if layouts else text


def _groups(marks: Sequence[Mark], narrow: float) -> list[list[Mark]]:
    """Marks in groups, each of those that are at most `narrow` steps behind its first one."""
    groups: list[list[Mark]] = []
    for mark in marks:
        if groups and mark.step - groups[-1][0].step <= narrow:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    return groups
