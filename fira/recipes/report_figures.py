"""Figures of the report as SVG, which is part of the HTML: curves of training runs, and the load of their experts."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import numpy as np

from fira.metrics.csv_log import parse_layers
from fira.metrics.plot_style import BLUE, GREY, INK, VERMILLION, downsample, plot_line, smooth, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

POINTS = 500  # of a curve
RECENT = 0.1  # share of the steps over which the load of the experts is averaged


def curves(log: DataFrame, baselines: dict[str, float]) -> str:
    """The losses of a run and, for preferences, the accuracy; else the learning rate and the throughput."""
    figure = _figure(9.6, 2.9)
    left, right = figure.subplots(1, 2)
    style_axes(left, "Loss", "mean over pairs" if "reward_margin" in log else "nats per token")
    for name, loss in baselines.items():
        left.axhline(loss, color=GREY, linestyle=(0, (5, 3)), linewidth=1)
        left.text(
            1, loss, f"{name} {loss:.2f} ", color=GREY, ha="right", va="bottom", transform=left.get_yaxis_transform()
        )
    _line(left, log, "train_loss", BLUE, "training")
    _points(left, log, "val_loss", VERMILLION, "validation")
    left.legend(frameon=False)
    if "reward_accuracy" in log:
        style_axes(right, "Pairs whose chosen answer has the larger reward", "")
        right.set_ylim(0, 1.05)
        _line(right, log, "reward_accuracy", BLUE, "training")
        _points(right, log, "val_reward_accuracy", VERMILLION, "validation")
        right.legend(frameon=False)
    else:
        style_axes(right, "Throughput", "tokens per second")
        _line(right, log, "tokens_per_s", BLUE, None)
        right.set_ylim(0, 1.2 * float(log["tokens_per_s"].quantile(0.98)) or 1)
    return _svg(figure)


def expert_load(log: DataFrame) -> str | None:
    """The share of each layer's assignments that each expert received at the end of a run; None without experts."""
    cells = log["expert_load"].dropna()
    if cells.empty:
        return None
    recent = [parse_layers(cell) for cell in cells.iloc[-max(1, round(RECENT * len(cells))) :]]
    layers = [np.mean([step[layer] for step in recent], axis=0) for layer in range(len(recent[0]))]
    figure = _figure(9.6, 1.9)
    axes = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for number, (panel, shares) in enumerate(zip(axes, layers, strict=True), 1):
        style_axes(panel, f"layer {number}", "share (%)" if number == 1 else "")
        panel.bar(range(1, len(shares) + 1), 100 * shares, color=BLUE)
        panel.axhline(100 / len(shares), color=GREY, linestyle=(0, (5, 3)), linewidth=1)
        panel.set_xlabel("expert", color=INK)
    return _svg(figure)


def _figure(width: float, height: float) -> Figure:
    """A figure with this size in inches, whose texts are texts of the SVG."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))


def _line(axes: Axes, log: DataFrame, column: str, colour: str, label: str | None) -> None:
    faint, clear = (downsample(values, POINTS) for values in (log[column], smooth(log[column])))
    steps = downsample(log["iter"], POINTS)
    plot_line(axes, steps, faint, color=colour, alpha=0.25, linewidth=0.8)
    plot_line(axes, steps, clear, color=colour, label=label)


def _points(axes: Axes, log: DataFrame, column: str, colour: str, label: str) -> None:
    known = log[log[column].notna()]
    plot_line(axes, known["iter"], known[column], color=colour, marker="o", markersize=4, label=label)


def _svg(figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fira", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    return re.sub(r'\s(width|height)="[\d.]+pt"', "", drawing, count=2)
