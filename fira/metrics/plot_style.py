"""Colours, axes and lines used by all plots."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fira.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from pandas import Series

# Okabe and Ito's palette, suitable for colour-blind readers, without its yellow, which is too light for lines.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
BLACK, INK, GREY = "#000000", "#333333", "#8a8a8a"
RUN_COLOURS = [BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, BLACK]
RUN_STYLES = ["solid", "dashed", "dashdot"]  # the next one is used when the colours are exhausted
MARKERS = 40  # of a line, at most
MAX_POINTS = 2000  # of a line; more than the pixels of a panel's width
MAX_COLUMNS = 300  # of a heat map


def save_png(figure: Figure, out: Path) -> None:
    """Write a PNG. Raises UserError if `out` has another suffix or cannot be written."""
    if out.suffix != ".png":
        raise UserError(f"{out}: the plot is a PNG; give a name that ends in .png")
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; give a writable path") from None


def style_axes(axes: Axes, title: str, label: str) -> None:
    """Set title, labels, grid and ticks; the x axis is the step."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel("step", color=INK)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_ylabel(label, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def plot_line(axes: Axes, steps: Series, values: Series, **style: Any) -> None:
    """Plot a line through the values that are not NaN, or a dot for a single value."""
    steps, values = steps[values.notna()], values.dropna()
    marker = {"marker": "o"} if len(values) == 1 else {}
    axes.plot(downsample(steps), downsample(values), **marker | style)


def plot_markers(axes: Axes, steps: Series, values: Series, **style: Any) -> None:
    """Plot the values that are not NaN, such as those of validations, as a line with markers on at most MARKERS."""
    count = int(values.notna().sum())
    plot_line(axes, steps, values, **{"marker": "o", "markersize": 4, "markevery": -(-count // MARKERS) or 1} | style)


def run_styles(count: int) -> list[dict[str, Any]]:
    """Colour and line style of each of several runs, all different for up to 21."""
    pairs = [{"color": colour, "linestyle": style} for style in RUN_STYLES for colour in RUN_COLOURS]
    return list(islice(cycle(pairs), count))


def legend_above(axes: Axes, columns: int = 3, **options: Any) -> None:
    """Put the legend above the panel on the right, where it covers no line."""
    axes.legend(
        **{"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.1, "frameon": False}
        | {"ncols": columns, "columnspacing": 1.2, "handlelength": 1.6, "fontsize": 9}
        | options
    )


def smooth(values: Series) -> Series:
    """Apply a centred running median, which is robust to outliers, and then a running mean."""
    window = {"window": max(1, len(values) // 50), "center": True, "min_periods": 1}
    return values.rolling(**window).median().rolling(**window).mean()


def heat_map(axes: Axes, steps: Series, values: np.ndarray, colours: str, maximum: float) -> AxesImage:
    """Draw values [experts, steps] in a colour map from 0 to `maximum`; NaN is white."""
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        vmin=0,
        vmax=maximum,
        extent=(steps.iloc[0] - 0.5, steps.iloc[-1] + 0.5, len(values) - 0.5, -0.5),
    )
    axes.grid(visible=False)
    axes.locator_params(axis="y", integer=True, min_n_ticks=1)
    return image


def downsample(rows: Any, limit: int = MAX_POINTS) -> Any:
    """Return at most `limit` evenly spaced rows of a series or frame, including the first and the last."""
    return rows.iloc[np.unique(np.linspace(0, len(rows) - 1, min(limit, len(rows))).round().astype(int))]
