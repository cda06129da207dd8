"""Plot load, dropped assignments and router entropy of every expert and layer over a run."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fira.errors import UserError
from fira.metrics.csv_log import LOG_NAME, parse_layers, read_log
from fira.metrics.plot_style import (
    BLUE,
    GREY,
    INK,
    MAX_COLUMNS,
    downsample,
    heat_map,
    plot_line,
    save_png,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import Series

STEP_TICKS = 4  # intervals between ticks, at most; the narrowest panel has room for the numbers of a long run


def plot_experts(path: Path, out: Path | None = None) -> Path:
    """Plot the experts of a run folder or CSV file, with a row of panels per MoE layer, and return the path of the PNG.

    `out` defaults to `experts.png` in the folder of the log. Dropped assignments have a column of panels only where any
    were dropped. Raises UserError for a log without experts.
    """
    import pandas as pd
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    file = path / LOG_NAME if path.is_dir() else path
    log = read_log(file)
    log = log[log["expert_load"].notna()]
    if log.empty:
        raise UserError(f"{file}: no step with experts; give a run of a Mixture-of-Experts model")
    log = downsample(log, MAX_COLUMNS)
    load, dropped, entropy = (_layers(log[name]) for name in ("expert_load", "expert_dropped", "layer_entropy"))
    maps = [("load", [share * len(share) for share in load], "PuOr_r", 2, ["none", "balanced", "≥ double"])]
    if dropped:
        maps.append(("dropped fraction of each expert's assignments", dropped, "Reds", 1, ["none", "half", "all"]))

    row_height = min(1.4, max(0.9, 11 / len(load)))  # inches
    height = 1.6 + row_height * len(load)
    figure = Figure(figsize=(13, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.05))
    figure.suptitle(f"{file.resolve().parent.name}: experts by MoE layer", fontsize=13, color=INK)
    widths = [3] * len(maps) + [2] * bool(entropy)
    grid = figure.subplots(len(load), len(widths), sharex=True, squeeze=False, width_ratios=widths)
    for column, (title, values, colours, maximum, labels) in enumerate(maps):
        for row, axes in enumerate(grid[:, column]):
            style_axes(axes, title if row == 0 else "", f"layer {row + 1}\nexpert" if column == 0 else "")
            image = heat_map(axes, log["iter"], values[row], colours, maximum)
        place: dict[str, Any] = {"location": "bottom", "aspect": 40, "pad": 0.1 / height}
        bar = figure.colorbar(image, ax=grid[:, column], ticks=[0, maximum / 2, maximum], **place)
        first, _, last = bar.ax.set_xticklabels(labels)
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
        bar.outline.set_visible(False)
    for row, [line] in enumerate(entropy):
        _plot_entropy(grid[row, -1], log["iter"], pd.Series(line, log.index), len(load[row]), row == 0)
    for axes in grid[:-1].flat:
        axes.set_xlabel("")
    grid[0, 0].locator_params(axis="x", nbins=STEP_TICKS)  # shared by all panels
    out = out or file.with_name("experts.png")
    save_png(figure, out)
    return out


def _plot_entropy(axes: Axes, steps: Series, values: Series, experts: int, first: bool) -> None:
    """Plot a router's entropy and, as a line, the entropy of the uniform distribution."""
    style_axes(axes, "router entropy; grey: uniform" if first else "", "")
    axes.axhline(np.log(experts), color=GREY, linewidth=1)
    axes.set_ylim(0, 1.1 * np.log(max(2, experts)))
    plot_line(axes, steps, values, color=BLUE)


def _layers(cells: Series) -> list[np.ndarray]:
    """Return an array [numbers, steps] per layer; an empty cell is zero unless all cells are empty."""
    if cells.isna().all():
        return []
    steps = [parse_layers(cell) if isinstance(cell, str) else None for cell in cells]
    shape = next(step for step in steps if step is not None)
    steps = [step or [[0.0] * len(layer) for layer in shape] for step in steps]
    return [np.array(list(zip_longest(*layer, fillvalue=np.nan))) for layer in zip(*steps, strict=True)]
