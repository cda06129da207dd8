"""Picture of one run: losses, optimizer, throughput and the load of its experts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from fira.metrics.csv_log import parse_layers
from fira.metrics.plot_style import (
    BLUE,
    GREY,
    INK,
    MAX_COLUMNS,
    ORANGE,
    VERMILLION,
    downsample,
    heat_map,
    legend_above,
    plot_line,
    plot_markers,
    smooth,
    style_axes,
)
from fira.metrics.plotted_run import SCALES, PlottedRun, draw_baselines, draw_imbalance, loss_unit, style_imbalance
from fira.metrics.run_marks import MARK_LINE, draw_marks, number_marks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec
    from pandas import DataFrame

MARK_COLUMNS = 2  # of the descriptions of marks
RAW = {"alpha": 0.25, "linewidth": 0.8}  # style of values that are also drawn smoothed


def draw_run(name: str, run: PlottedRun, baselines: Mapping[str, float]) -> Figure:
    """Return the picture; a run on preferences has a panel of its rewards. baselines: losses in nats per token."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    has_rewards = "reward_margin" in run.log
    rows = 3 if has_rewards else 2
    height = 4.1 * rows
    figure = Figure(figsize=(13, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    figure.suptitle(_title(name, run.steps), fontsize=13, color=INK)
    grid = figure.add_gridspec(rows, 2)
    marks = _plot_loss(figure.add_subplot(grid[0, 0]), run, baselines)
    _plot_pair(figure.add_subplot(grid[0, 1]), run, "Learning rate and gradient norm", "lr", "grad_norm")
    _plot_pair(figure.add_subplot(grid[1, 0]), run, "Throughput", "tokens_per_s", "mfu")
    _plot_experts(figure, grid[1, 1], run)
    if has_rewards:
        _plot_rewards(figure.add_subplot(grid[2, :]), run)
    if marks:
        figure.set_figheight(height + 0.2 * -(-len(marks) // MARK_COLUMNS))
        handles = [Line2D([], [], **MARK_LINE, label=text) for text in marks]
        figure.legend(handles=handles, loc="outside lower center", ncols=MARK_COLUMNS, frameon=False, fontsize=8)
    return figure


def _plot_loss(axes: Axes, run: PlottedRun, baselines: Mapping[str, float]) -> list[str]:
    """Plot the losses, and number the marks. Return what happened at each of them."""
    style_axes(axes, "Loss", loss_unit([run]))
    plot_line(axes, run.steps["iter"], run.steps["train_loss"], color=BLUE, **RAW)
    plot_line(axes, run.steps["iter"], smooth(run.steps["train_loss"]), color=BLUE, label="training")
    plot_markers(axes, run.log["iter"], run.log["val_loss"], color=VERMILLION, label="validation")
    draw_baselines(axes, [run], baselines)
    draw_marks(axes, run.marks)
    legend_above(axes)
    return number_marks(axes, run.marks)


def _plot_rewards(axes: Axes, run: PlottedRun) -> None:
    """Plot the rewards of chosen and rejected answers on the left scale, and on the right one the accuracy."""
    right = axes.twinx()
    style_axes(axes, "Rewards of preferences, and how often the chosen answer has the larger one", "reward")
    style_axes(right, "", "accuracy (%)")
    right.set_ylim(0, 105)
    right.grid(visible=False)
    lines = [(axes, "reward_chosen", "chosen", BLUE, 1), (axes, "reward_rejected", "rejected", VERMILLION, 1)]
    lines.append((right, "reward_accuracy", "accuracy", GREY, 100))
    log, steps = run.log, run.steps
    for panel, column, label, colour, scale in lines:
        plot_line(panel, steps["iter"], steps[column] * scale, color=colour, **RAW)
        plot_line(panel, steps["iter"], smooth(steps[column] * scale), color=colour, label=label)
        plot_markers(panel, log["iter"], log[f"val_{column}"] * scale, color=colour, linestyle="dotted")
    right.plot([], [], color=INK, linestyle="dotted", marker="o", markersize=4, label="validation")
    draw_marks(axes, run.marks)
    handles = [handle for panel in (axes, right) for handle in panel.get_legend_handles_labels()[0]]
    legend_above(axes, columns=4, handles=handles)


def _plot_pair(axes: Axes, run: PlottedRun, title: str, left: str, right: str) -> None:
    """Plot two columns over the steps: `left` solid on the left scale, `right` dashed on the right scale.

    The scales have different headroom, so that proportional columns such as throughput and MFU do not cover each other.
    """
    right_axes = axes.twinx()
    highest = {name: run.steps[name].quantile(0.99) * SCALES[name][1] for name in (left, right)}
    tops = {left: 1.15 * highest[left], right: 1.7 * highest[right]}
    if right == "mfu" and tops[right] > 100:  # a peak that was measured next to other programs can be exceeded
        tops = {left: 2 * highest[left], right: max(100, 1.15 * highest[right])}
    panels = ((axes, left, BLUE, "solid"), (right_axes, right, ORANGE, "dashed"))
    for panel, name, colour, line_style in panels:
        label, scale, is_noisy = SCALES[name]
        style_axes(panel, title if panel is axes else "", label)
        panel.yaxis.label.set_color(colour)
        panel.set_ylim(0, tops[name] if tops[name] > 0 else 1)
        values = run.steps[name] * scale
        if is_noisy:
            plot_line(panel, run.steps["iter"], values, color=colour, **RAW)
        shown = smooth(values) if is_noisy else values
        plot_line(panel, run.steps["iter"], shown, color=colour, linestyle=line_style)
    right_axes.grid(visible=False)
    draw_marks(axes, run.marks)


def _plot_experts(figure: Figure, subplot: SubplotSpec, run: PlottedRun) -> None:
    """Plot the imbalance of the worst layer (top) and the load of each expert, averaged over layers (bottom)."""
    loads = run.steps.loc[run.steps["expert_load"].notna(), ["iter", "expert_load"]]
    if loads.empty:
        axes = figure.add_subplot(subplot)
        style_axes(axes, "Expert load", "")
        axes.set(xticks=[], yticks=[], xlabel="")
        axes.text(0.5, 0.5, "no experts in this model", color=GREY, ha="center", transform=axes.transAxes)
        return
    rows = subplot.subgridspec(2, 1, height_ratios=(1, 2))
    above = figure.add_subplot(rows[0])
    style_imbalance(above)
    draw_imbalance(above, run, color=BLUE)
    above.set_xlabel("")
    above.tick_params(labelbottom=False)

    loads = downsample(loads, MAX_COLUMNS)
    means = [_mean_over_layers(parse_layers(cell)) for cell in loads["expert_load"]]
    shares = np.array(list(zip_longest(*means, fillvalue=np.nan)))  # [experts, steps]
    experts = len(shares)
    below = figure.add_subplot(rows[1], sharex=above)
    style_axes(below, "Load of each expert, mean of the layers", "expert")
    image = heat_map(below, loads["iter"], shares * experts, "PuOr_r", 2)
    bar = figure.colorbar(image, ax=below, ticks=[0, 1, 2], pad=0.01, aspect=12)
    bar.set_ticklabels(["none", "balanced", "≥ double"])
    bar.outline.set_visible(False)
    draw_marks(above, run.marks)


def _mean_over_layers(layers: list[list[float]]) -> np.ndarray:
    """Return the mean load of each expert over the layers that have it."""
    return np.nanmean(np.array(list(zip_longest(*layers, fillvalue=np.nan))), axis=1)


def _title(name: str, steps: DataFrame) -> str:
    """Return the name of the run, its last step and its losses."""
    last = steps.iloc[-1]
    title = f"{name}: step {int(last['iter']):,}, training loss {last['train_loss']:.3f}"
    if steps["val_loss"].notna().any():
        best = steps.iloc[steps["val_loss"].argmin()]
        title += f", best validation loss {best['val_loss']:.3f} at step {int(best['iter']):,}"
    if steps["bubble"].notna().any():
        title += f", pipeline bubble {steps['bubble'].median():.0%}"
    return title
