"""A run as the pictures show it, and what the pictures of one and of several runs have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from fira.metrics.plot_style import GREY, plot_line, smooth, style_axes
from fira.metrics.run_marks import Mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

LABEL_HEIGHT = 0.07  # of a panel's height; smallest distance of the labels of two baselines
# Axis label and scale factor of a column, and whether it is smoothed.
SCALES = {
    "lr": ("learning rate", 1, False),
    "grad_norm": ("gradient norm", 1, True),
    "tokens_per_s": ("thousand tokens per second", 1e-3, True),
    "mfu": ("model FLOPs utilisation (%)", 100, True),
}


@dataclass(frozen=True)
class PlottedRun:
    """log: as returned by `read_log` with `first` 0. marks: see `marks_of`."""

    log: DataFrame
    marks: Sequence[Mark] = ()

    @property
    def steps(self) -> DataFrame:
        """The rows of the log without the validation before the first step."""
        return self.log[self.log["iter"] > 0]

    def finite(self) -> PlottedRun:
        """The run with NaN in place of infinite values, which are not drawn."""
        return replace(self, log=self.log.replace([np.inf, -np.inf], np.nan))


def loss_unit(runs: Iterable[PlottedRun]) -> str:
    """The label of the losses, from a column that logs of the objective have."""
    for column, label in (("reward_margin", "mean over pairs"), ("answer_tokens", "share of wrong answers")):
        if all(column in run.log for run in runs):
            return label
    return "nats per token"


def draw_baselines(axes: Axes, runs: Iterable[PlottedRun], baselines: Mapping[str, float]) -> None:
    """Draw a line for the loss of each n-gram model, unless a run's loss is a divergence, which is another number.

    Call it after the lines of the panel, whose height the distances of the labels depend on.
    """
    if any("cross_entropy" in run.log for run in runs):
        return
    for loss in baselines.values():
        axes.axhline(loss, color=GREY, linestyle=(0, (5, 3)), linewidth=1, zorder=1)
    low, high = axes.get_ylim()
    place: dict[str, Any] = {"ha": "left", "va": "center", "transform": axes.get_yaxis_transform()}
    label_at = -np.inf
    for name, loss in sorted(baselines.items(), key=itemgetter(1)):
        label_at = max(loss, label_at + LABEL_HEIGHT * (high - low))
        axes.text(1.01, label_at, f"{name} {loss:.2f}", color=GREY, fontsize=8, **place)  # right of the panel


def draw_imbalance(axes: Axes, run: PlottedRun, **style: Any) -> None:
    """Plot the largest load of an expert in the worst layer."""
    plot_line(axes, run.steps["iter"], smooth(run.steps["load_imbalance"]), **style)


def style_imbalance(axes: Axes) -> None:
    """Set the title, and draw the line of equal loads."""
    style_axes(axes, "Largest expert load, worst layer", "× balanced")
    axes.axhline(1, color=GREY, linewidth=1, zorder=1)
    axes.margins(y=0.15)
