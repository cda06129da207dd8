"""The picture of a run, or of several side by side: losses, optimizer, throughput, expert load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fira.errors import UserError
from fira.metrics.csv_log import LOG_NAME, parse_layers, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec
    from matplotlib.image import AxesImage
    from pandas import DataFrame, Series

# What a column is called on its axis, what it is multiplied by, and whether it is noisy.
SCALES = {
    "lr": ("learning rate", 1, False),
    "grad_norm": ("gradient norm", 1, True),
    "tokens_per_s": ("thousand tokens per second", 1e-3, True),
    "mfu": ("model FLOPs utilisation (%)", 100, True),
}
# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
RUN_COLOURS = [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY]
INK, GREY = "#333333", "#8a8a8a"
MOST_POINTS = 2000  # more than the picture has pixels across a panel
MOST_COLUMNS = 300  # of the expert heat map


def plot_files(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Plot run folders or CSV files; returns the PNG's path.

    `out` defaults to `training_progress.png` beside the one log, or `comparison.png` here for several. Baselines come
    from `data.json` beside a log, `{"baselines": {"unigram": 6.1}}`; of several runs, those on which all agree.
    """
    files = [path / LOG_NAME if path.is_dir() else path for path in paths]
    logs: dict[str, DataFrame] = {}
    for file in files:
        name = file.resolve().parent.name if file.name == LOG_NAME else file.stem
        logs[str(file) if name in logs else name] = read_log(file)
    found = [_read_baselines(file.with_name("data.json")) for file in files]
    shared = {name: loss for name, loss in found[0].items() if all(other.get(name) == loss for other in found)}
    if out is None:
        out = files[0].with_name("training_progress.png") if len(files) == 1 else Path("comparison.png")
    plot_runs(logs, out, shared)
    return out


def plot_runs(logs: dict[str, DataFrame], out: Path, baselines: dict[str, float] | None = None) -> None:
    """Draw named logs (as `read_log` gives them) into the PNG `out`; `baselines` are losses in nats per token.

    One run shows its expert load in full; several share the panels, a colour each. UserError for a log without a step
    and for a path that cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    for name, log in logs.items():
        if log.empty:
            raise UserError(f"{name}: the log has no step yet; plot it once training has done one")
    logs = {name: log.replace([np.inf, -np.inf], np.nan) for name, log in logs.items()}
    figure = Figure(figsize=(13, 8.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    figure.suptitle(_title(logs), fontsize=13, color=INK)
    grid = figure.add_gridspec(2, 2)
    _plot_loss(figure.add_subplot(grid[0, 0]), logs, baselines or {})
    _plot_pair(figure.add_subplot(grid[0, 1]), logs, "Learning rate and gradient norm", "lr", "grad_norm")
    _plot_pair(figure.add_subplot(grid[1, 0]), logs, "Throughput", "tokens_per_s", "mfu")
    if len(logs) == 1:
        _plot_experts(figure, grid[1, 1], logs)
    else:
        _plot_imbalance(figure.add_subplot(grid[1, 1]), logs)
    save(figure, out)


def save(figure: Figure, out: Path) -> None:
    """Write a PNG; UserError where that cannot be."""
    if out.suffix != ".png":
        raise UserError(f"{out}: the picture is a PNG; give a name that ends in .png")
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; give a path that can be written") from None


def _plot_loss(axes: Axes, logs: dict[str, DataFrame], baselines: dict[str, float]) -> None:
    dress(axes, "Loss", "nats per token")
    alone = len(logs) == 1
    for name, loss in baselines.items():
        axes.axhline(loss, color=GREY, linestyle=(0, (5, 3)), linewidth=1)
        label = f"{name} {loss:.2f} "
        axes.text(1, loss, label, color=GREY, ha="right", va="bottom", transform=axes.get_yaxis_transform())
    for colour, (name, log) in zip(_cycle(logs), logs.items(), strict=True):
        if alone:
            _draw(axes, log["iter"], log["train_loss"], color=colour, alpha=0.25, linewidth=0.8)
        _draw(axes, log["iter"], _smooth(log["train_loss"]), color=colour, label="training" if alone else name)
        _draw(
            axes,
            log["iter"],
            log["val_loss"],
            color=VERMILLION if alone else colour,
            linestyle="solid" if alone else "dotted",
            marker="o",
            markersize=4,
            markevery=0.02,  # of the panel's diagonal
            label="validation" if alone else None,
        )
    if not alone:
        axes.plot([], [], color=INK, linestyle="dotted", marker="o", markersize=4, label="validation")
    axes.legend(frameon=False, loc="best")


def _plot_pair(axes: Axes, logs: dict[str, DataFrame], title: str, left: str, right: str) -> None:
    """Two columns over the steps: `left` solid on the left scale, `right` dashed on the right one."""
    beside = axes.twinx()
    alone = len(logs) == 1
    colours = {left: [BLUE], right: [ORANGE]} if alone else {left: _cycle(logs), right: _cycle(logs)}
    # Headroom differs, so that two columns in proportion (throughput and its share of the peak) do not hide each other.
    for panel, name, style, headroom in ((axes, left, "solid", 1.15), (beside, right, "dashed", 1.7)):
        label, scale, noisy = SCALES[name]
        dress(panel, title if panel is axes else "", label if alone else f"{label}, {style}")
        highest = max(log[name].quantile(0.99) * scale if log[name].notna().any() else 0 for log in logs.values())
        panel.set_ylim(0, headroom * highest or 1)
        for colour, log in zip(colours[name], logs.values(), strict=True):
            values = log[name] * scale
            if alone:
                panel.yaxis.label.set_color(colour)
            if alone and noisy:
                _draw(panel, log["iter"], values, color=colour, alpha=0.25, linewidth=0.8)
            _draw(panel, log["iter"], _smooth(values) if noisy else values, color=colour, linestyle=style)
    beside.grid(visible=False)


def _plot_experts(figure: Figure, place: SubplotSpec, logs: dict[str, DataFrame]) -> None:
    """One run's expert load: the worst layer's imbalance above, each expert's share, averaged over layers, below."""
    [log] = logs.values()
    loads = log.loc[log["expert_load"].notna(), ["iter", "expert_load"]]
    if loads.empty:
        axes = figure.add_subplot(place)
        dress(axes, "Expert load", "")
        axes.set(xticks=[], yticks=[], xlabel="")
        axes.text(0.5, 0.5, "no experts in this model", color=GREY, ha="center", transform=axes.transAxes)
        return
    rows = place.subgridspec(2, 1, height_ratios=(1, 2))
    above = figure.add_subplot(rows[0])
    _plot_imbalance(above, logs)
    above.set_xlabel("")
    above.tick_params(labelbottom=False)

    loads = thin(loads, MOST_COLUMNS)
    means = [_mean_over_layers(parse_layers(cell)) for cell in loads["expert_load"]]
    shares = np.array(list(zip_longest(*means, fillvalue=np.nan)))  # experts × steps
    experts = len(shares)
    below = figure.add_subplot(rows[1], sharex=above)
    dress(below, "", "expert, mean of layers")
    image = heat_map(below, loads["iter"], shares * experts, "PuOr_r", 2)
    bar = figure.colorbar(image, ax=below, ticks=[0, 1, 2], pad=0.01, aspect=12)
    bar.set_ticklabels(["none", "even", "≥ double"])
    bar.outline.set_visible(False)


def heat_map(axes: Axes, steps: Series, values: np.ndarray, colours: str, most: float) -> AxesImage:
    """values: [experts, steps], in colours from 0 to `most`; a white cell has none."""
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        vmin=0,
        vmax=most,
        extent=(steps.iloc[0] - 0.5, steps.iloc[-1] + 0.5, len(values) - 0.5, -0.5),
    )
    axes.grid(visible=False)
    axes.locator_params(axis="y", integer=True, min_n_ticks=1)
    return image


def _plot_imbalance(axes: Axes, logs: dict[str, DataFrame]) -> None:
    dress(axes, "Expert load, and its imbalance in the worst layer (1 is even)", "imbalance")
    axes.axhline(1, color=GREY, linewidth=1)
    for colour, log in zip(_cycle(logs), logs.values(), strict=True):
        _draw(axes, log["iter"], _smooth(log["load_imbalance"]), color=colour)
    axes.margins(y=0.15)


def _mean_over_layers(layers: list[list[float]]) -> np.ndarray:
    """Average each expert's share over the layers that have it."""
    return np.nanmean(np.array(list(zip_longest(*layers, fillvalue=np.nan))), axis=1)


def _draw(axes: Axes, steps: Series, values: Series, **style: Any) -> None:
    """A line through the values there are; a lone one, which makes no line, as a dot."""
    steps, values = steps[values.notna()], values.dropna()
    lone = {"marker": "o"} if len(values) == 1 else {}
    axes.plot(thin(steps), thin(values), **lone | style)


def dress(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel("step", color=INK)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_ylabel(label, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _title(logs: dict[str, DataFrame]) -> str:
    """What a reader asks first: which run, how far, how good."""
    if len(logs) > 1:
        return f"{len(logs)} runs compared"
    [(name, log)] = logs.items()
    last = log.iloc[-1]
    title = f"{name}: step {int(last['iter']):,}, training loss {last['train_loss']:.3f}"
    if log["val_loss"].notna().any():
        best = log.iloc[log["val_loss"].argmin()]
        title += f", best validation loss {best['val_loss']:.3f} at step {int(best['iter']):,}"
    if log["bubble"].notna().any():
        title += f", pipeline bubble {log['bubble'].median():.0%}"
    return title


def _cycle(logs: dict[str, DataFrame]) -> list[str]:
    return [RUN_COLOURS[index % len(RUN_COLOURS)] for index in range(len(logs))]


def _smooth(values: Series) -> Series:
    """A centred running median, which a spike or a slow step does not bend, and a mean over its stairs."""
    window = {"window": max(1, len(values) // 50), "center": True, "min_periods": 1}
    return values.rolling(**window).median().rolling(**window).mean()


def thin(rows: Any, most: int = MOST_POINTS) -> Any:
    """At most `most` rows of a series or frame, evenly chosen, the first and the last among them."""
    return rows.iloc[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))]


def _read_baselines(path: Path) -> dict[str, float]:
    """`{"baselines": {name: loss}}` from a run's data.json; none where there is no such file or key."""
    if not path.exists():
        return {}
    try:
        baselines = json.loads(path.read_text(encoding="utf-8")).get("baselines", {})
        return {name: float(loss) for name, loss in baselines.items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f'{path}: not of the form {{"baselines": {{"unigram": 6.1}}}}; mend or remove it') from None
