"""What each expert of each layer did over a run: its load, what it had to drop, how undecided the router was."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fira.errors import UserError
from fira.metrics.csv_log import LOG_NAME, parse_layers, read_log
from fira.metrics.run_plots import BLUE, GREY, INK, MOST_COLUMNS, dress, heat_map, save, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import Series


def plot_experts(path: Path, out: Path | None = None) -> Path:
    """Plot a run folder's or a CSV file's experts, a row of panels per MoE layer; returns the path of the PNG.

    `out` defaults to `experts.png` beside the log. What was dropped has a column where anything was. UserError for a
    log without experts.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    file = path / LOG_NAME if path.is_dir() else path
    log = read_log(file)
    log = log[log["expert_load"].notna()]
    if log.empty:
        raise UserError(f"{file}: no step with experts in it; give a run of a model that has some")
    log = thin(log, MOST_COLUMNS)
    load, dropped, entropy = (_layers(log[name]) for name in ("expert_load", "expert_dropped", "layer_entropy"))
    maps = [("load", [share * len(share) for share in load], "PuOr_r", 2, ["none", "even", "≥ double"])]
    if dropped:
        maps.append(("dropped, of each expert's own", dropped, "Reds", 1, ["none", "half", "all"]))

    figure = Figure(figsize=(13, 1.6 + 1.4 * len(load)), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.05))
    figure.suptitle(f"{file.resolve().parent.name}: experts, layer by layer", fontsize=13, color=INK)
    widths = [3] * len(maps) + [2] * bool(entropy)
    grid = figure.subplots(len(load), len(widths), sharex=True, squeeze=False, width_ratios=widths)
    for column, (title, values, colours, most, words) in enumerate(maps):
        for row, axes in enumerate(grid[:, column]):
            dress(axes, title if row == 0 else "", f"MoE layer {row + 1}\nexpert" if column == 0 else "")
            image = heat_map(axes, log["iter"], values[row], colours, most)
        bar = figure.colorbar(image, ax=grid[:, column], location="bottom", ticks=[0, most / 2, most], aspect=40)
        bar.set_ticklabels(words)
        bar.outline.set_visible(False)
    for row, [line] in enumerate(entropy):
        _plot_entropy(grid[row, -1], log["iter"], line, len(load[row]), row == 0)
    for axes in grid[:-1].flat:
        axes.set_xlabel("")
    out = out or file.with_name("experts.png")
    save(figure, out)
    return out


def _plot_entropy(axes: Axes, steps: Series, values: np.ndarray, experts: int, first: bool) -> None:
    """A router's entropy between zero and that of even chances."""
    dress(axes, "router entropy (nats; grey: even chances)" if first else "", "")
    axes.axhline(np.log(experts), color=GREY, linewidth=1)
    axes.set_ylim(0, 1.1 * np.log(max(2, experts)))
    axes.plot(steps, values, color=BLUE)


def _layers(cells: Series) -> list[np.ndarray]:
    """A column's cells as an array [numbers, steps] per layer; an empty cell among others is all zeros."""
    if cells.isna().all():
        return []
    steps = [parse_layers(cell) if isinstance(cell, str) else None for cell in cells]
    like = next(step for step in steps if step is not None)
    steps = [step or [[0.0] * len(layer) for layer in like] for step in steps]
    return [np.array(list(zip_longest(*layer, fillvalue=np.nan))) for layer in zip(*steps, strict=True)]
