"""Picture of several runs: a panel per number, and a colour and line style per run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fira.metrics.csv_log import parse_layers
from fira.metrics.plot_style import (
    INK,
    MAX_COLUMNS,
    downsample,
    plot_line,
    plot_markers,
    run_styles,
    smooth,
    style_axes,
)
from fira.metrics.plotted_run import SCALES, PlottedRun, draw_baselines, draw_imbalance, loss_unit, style_imbalance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Throughput",
    "mfu": "Utilisation",
}
FEW = 0.5  # share of the balanced load below which an expert counts as unused
LONGEST_NAME = 40  # characters
MARK_SHAPES = {"resumed": "^", "rollback": "v"}

Runs = Mapping[str, PlottedRun]
Styles = Mapping[str, dict[str, Any]]


def draw_comparison(runs: Runs, baselines: Mapping[str, float]) -> Figure:
    """Return the picture. baselines: losses in nats per token."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    styles = dict(zip(runs, run_styles(len(runs)), strict=True))
    has_experts = any(run.log["expert_load"].notna().any() for run in runs.values())
    rows = 4 if has_experts else 3
    figure = Figure(figsize=(13, 3.4 * rows), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    figure.suptitle(f"{len(runs)} runs compared", fontsize=13, color=INK)
    grid = figure.subplots(rows, 2)
    _plot_losses(grid[0, 0], grid[0, 1], runs, styles, baselines)
    for axes, column in zip(grid[1:3].flat, SCALES, strict=True):
        _plot_column(axes, runs, styles, column)
    if has_experts:
        _plot_experts(grid[3, 0], grid[3, 1], runs, styles)
    handles = [Line2D([], [], **style, label=_shortened(name)) for name, style in styles.items()]
    kinds = {mark.kind for run in runs.values() for mark in run.marks}
    for kind, shape in MARK_SHAPES.items():
        if kind in kinds:
            handles.append(Line2D([], [], color=INK, linestyle="none", marker=shape, label=kind))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _plot_losses(left: Axes, right: Axes, runs: Runs, styles: Styles, baselines: Mapping[str, float]) -> None:
    """Plot training losses with triangles at resumes and rollbacks, and validation losses."""
    for axes, title in ((left, "Training loss, smoothed"), (right, "Validation loss")):
        style_axes(axes, title, loss_unit(runs.values()))
    for name, run in runs.items():
        steps, style = run.steps, styles[name]
        plot_line(left, steps["iter"], smooth(steps["train_loss"]), **style)
        plot_markers(right, run.log["iter"], run.log["val_loss"], **style)
        for mark in run.marks:
            place: dict[str, Any] = {"transform": left.get_xaxis_transform(), "linestyle": "none", "clip_on": False}
            left.plot(mark.step, 0.02, color=style["color"], marker=MARK_SHAPES[mark.kind], **place)
    for axes in (left, right):
        draw_baselines(axes, runs.values(), baselines)


def _plot_column(axes: Axes, runs: Runs, styles: Styles, column: str) -> None:
    label, scale, is_noisy = SCALES[column]
    style_axes(axes, TITLES[column], label)
    for name, run in runs.items():
        values = run.steps[column] * scale
        plot_line(axes, run.steps["iter"], smooth(values) if is_noisy else values, **styles[name])
    highest = max((float(y) for line in axes.lines for y in np.asarray(line.get_ydata())), default=0.0)
    capped = column == "mfu" and 0 < highest <= 100
    axes.set_ylim(0, min(1.15 * highest, 100) if capped else 1.15 * highest or 1)


def _plot_experts(left: Axes, right: Axes, runs: Runs, styles: Styles) -> None:
    """Plot the largest load of an expert, and how many experts have less than half of the balanced load."""
    style_imbalance(left)
    style_axes(right, f"Experts with less than {FEW} × balanced load", "% of all experts")
    for name, run in runs.items():
        draw_imbalance(left, run, **styles[name])
        loads = downsample(run.steps.loc[run.steps["expert_load"].notna(), ["iter", "expert_load"]], MAX_COLUMNS)
        unused = loads["expert_load"].map(_unused).astype(float)
        plot_line(right, loads["iter"], smooth(100 * unused), **styles[name])
    right.set_ylim(-2, 102)


def _unused(cell: str) -> float:
    """The share of the experts in all layers whose load is below FEW."""
    is_low = [share * len(layer) < FEW for layer in parse_layers(cell) for share in layer]
    return sum(is_low) / len(is_low)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"…{name[-LONGEST_NAME:]}"
