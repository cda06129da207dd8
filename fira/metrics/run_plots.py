"""Plot one run or compare several: losses, optimizer, throughput and expert load."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fira.errors import UserError
from fira.json_reader import mapping, number, read, record
from fira.metrics.csv_log import LOG_NAME, parse_layers, read_log
from fira.metrics.plot_style import (
    BLUE,
    GREY,
    INK,
    MAX_COLUMNS,
    ORANGE,
    RUN_COLOURS,
    VERMILLION,
    downsample,
    heat_map,
    plot_line,
    save_png,
    smooth,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec
    from pandas import DataFrame

# Axis label and scale factor of a column, and whether it is smoothed.
SCALES = {
    "lr": ("learning rate", 1, False),
    "grad_norm": ("gradient norm", 1, True),
    "tokens_per_s": ("thousand tokens per second", 1e-3, True),
    "mfu": ("model FLOPs utilisation (%)", 100, True),
}


def plot_files(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Plot run folders or CSV files and return the path of the PNG.

    `out` defaults to `training_progress.png` in the folder of a single log, and to `comparison.png` in the current
    folder for several. Baselines are read from `data.json` in the folder of a log, `{"baselines": {"unigram": 6.1}}`;
    with several runs, only baselines that are equal in all of them are drawn.
    """
    files = [path / LOG_NAME if path.is_dir() else path for path in paths]
    logs: dict[str, DataFrame] = {}
    for file in files:
        name = file.resolve().parent.name if file.name == LOG_NAME else file.stem
        logs[str(file) if name in logs else name] = read_log(file)
    baselines = [_read_baselines(file.with_name("data.json")) for file in files]
    shared = {name: loss for name, loss in baselines[0].items() if all(other.get(name) == loss for other in baselines)}
    if out is None:
        out = files[0].with_name("training_progress.png") if len(files) == 1 else Path("comparison.png")
    plot_runs(logs, out, shared)
    return out


def plot_runs(logs: dict[str, DataFrame], out: Path, baselines: dict[str, float] | None = None) -> None:
    """Plot named logs, as returned by `read_log`, to the PNG `out`; `baselines` are losses in nats per token.

    The plot of a single run contains the load of each expert, and the rewards of a run on preferences. Several runs
    share the panels, with a colour per run.
    Raises UserError for a log without steps and for a path that cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    for name, log in logs.items():
        if log.empty:
            raise UserError(f"{name}: the log has no step yet; plot it after the first training step")
    logs = {name: log.replace([np.inf, -np.inf], np.nan) for name, log in logs.items()}
    rewards = [log for log in logs.values() if len(logs) == 1 and "reward_margin" in log]
    rows = 2 + len(rewards)
    figure = Figure(figsize=(13, 4.1 * rows), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    figure.suptitle(_title(logs), fontsize=13, color=INK)
    grid = figure.add_gridspec(rows, 2)
    _plot_loss(figure.add_subplot(grid[0, 0]), logs, baselines or {})
    _plot_pair(figure.add_subplot(grid[0, 1]), logs, "Learning rate and gradient norm", "lr", "grad_norm")
    _plot_pair(figure.add_subplot(grid[1, 0]), logs, "Throughput", "tokens_per_s", "mfu")
    if len(logs) == 1:
        _plot_experts(figure, grid[1, 1], logs)
    else:
        _plot_imbalance(figure.add_subplot(grid[1, 1]), logs)
    for log in rewards:
        _plot_rewards(figure.add_subplot(grid[2, :]), log)
    save_png(figure, out)


def _plot_loss(axes: Axes, logs: dict[str, DataFrame], baselines: dict[str, float]) -> None:
    style_axes(axes, "Loss", _loss_unit(logs))
    single = len(logs) == 1
    if any("cross_entropy" in log for log in logs.values()):
        baselines = {}  # the loss is a divergence, which is not comparable
    for name, loss in baselines.items():
        axes.axhline(loss, color=GREY, linestyle=(0, (5, 3)), linewidth=1)
        label = f"{name} {loss:.2f} "
        axes.text(1, loss, label, color=GREY, ha="right", va="bottom", transform=axes.get_yaxis_transform())
    for colour, (name, log) in zip(cycle(RUN_COLOURS), logs.items(), strict=False):
        if single:
            plot_line(axes, log["iter"], log["train_loss"], color=colour, alpha=0.25, linewidth=0.8)
        plot_line(axes, log["iter"], smooth(log["train_loss"]), color=colour, label="training" if single else name)
        plot_line(
            axes,
            log["iter"],
            log["val_loss"],
            color=VERMILLION if single else colour,
            linestyle="solid" if single else "dotted",
            marker="o",
            markersize=4,
            markevery=0.02,  # of the panel's diagonal
            label="validation" if single else None,
        )
    if not single:
        axes.plot([], [], color=INK, linestyle="dotted", marker="o", markersize=4, label="validation")
    axes.legend(frameon=False, loc="best")


def _loss_unit(logs: dict[str, DataFrame]) -> str:
    """The label of the losses, from a column that logs of the objective have."""
    for column, label in (("reward_margin", "mean over pairs"), ("answer_tokens", "share of wrong answers")):
        if all(column in log for log in logs.values()):
            return label
    return "nats per token"


def _plot_rewards(axes: Axes, log: DataFrame) -> None:
    """Plot the rewards of chosen and rejected answers on the left scale, and on the right one the accuracy."""
    right = axes.twinx()
    style_axes(axes, "Rewards of preferences, and how often the chosen answer has the larger one", "reward")
    style_axes(right, "", "accuracy (%)")
    right.set_ylim(0, 105)
    right.grid(visible=False)
    lines = [(axes, "reward_chosen", "chosen", BLUE, 1), (axes, "reward_rejected", "rejected", VERMILLION, 1)]
    lines.append((right, "reward_accuracy", "accuracy", GREY, 100))
    for panel, column, label, colour, scale in lines:
        plot_line(panel, log["iter"], log[column] * scale, color=colour, alpha=0.25, linewidth=0.8)
        plot_line(panel, log["iter"], smooth(log[column] * scale), color=colour, label=label)
        held_out = {"marker": "o", "markersize": 4, "linestyle": "dotted", "markevery": 0.02}
        plot_line(panel, log["iter"], log[f"val_{column}"] * scale, color=colour, **held_out)
    right.plot([], [], color=INK, linestyle="dotted", marker="o", markersize=4, label="validation")
    handles = [handle for panel in (axes, right) for handle in panel.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, frameon=False, loc="best")


def _plot_pair(axes: Axes, logs: dict[str, DataFrame], title: str, left: str, right: str) -> None:
    """Plot two columns over the steps: `left` solid on the left scale, `right` dashed on the right scale."""
    right_axes = axes.twinx()
    single = len(logs) == 1
    colours = {left: [BLUE], right: [ORANGE]} if single else dict.fromkeys((left, right), RUN_COLOURS)
    # Different headroom, so that proportional columns such as throughput and MFU do not cover each other.
    for panel, name, style, headroom in ((axes, left, "solid", 1.15), (right_axes, right, "dashed", 1.7)):
        label, scale, noisy = SCALES[name]
        style_axes(panel, title if panel is axes else "", label if single else f"{label}, {style}")
        highest = max(log[name].quantile(0.99) * scale if log[name].notna().any() else 0 for log in logs.values())
        panel.set_ylim(0, headroom * highest or 1)
        for colour, log in zip(cycle(colours[name]), logs.values(), strict=False):
            values = log[name] * scale
            if single:
                panel.yaxis.label.set_color(colour)
            if single and noisy:
                plot_line(panel, log["iter"], values, color=colour, alpha=0.25, linewidth=0.8)
            plot_line(panel, log["iter"], smooth(values) if noisy else values, color=colour, linestyle=style)
    right_axes.grid(visible=False)


def _plot_experts(figure: Figure, subplot: SubplotSpec, logs: dict[str, DataFrame]) -> None:
    """Plot the imbalance of the worst layer (top) and the load of each expert, averaged over layers (bottom)."""
    [log] = logs.values()
    loads = log.loc[log["expert_load"].notna(), ["iter", "expert_load"]]
    if loads.empty:
        axes = figure.add_subplot(subplot)
        style_axes(axes, "Expert load", "")
        axes.set(xticks=[], yticks=[], xlabel="")
        axes.text(0.5, 0.5, "no experts in this model", color=GREY, ha="center", transform=axes.transAxes)
        return
    rows = subplot.subgridspec(2, 1, height_ratios=(1, 2))
    above = figure.add_subplot(rows[0])
    _plot_imbalance(above, logs)
    above.set_xlabel("")
    above.tick_params(labelbottom=False)

    loads = downsample(loads, MAX_COLUMNS)
    means = [_mean_over_layers(parse_layers(cell)) for cell in loads["expert_load"]]
    shares = np.array(list(zip_longest(*means, fillvalue=np.nan)))  # [experts, steps]
    experts = len(shares)
    below = figure.add_subplot(rows[1], sharex=above)
    style_axes(below, "", "expert, mean of layers")
    image = heat_map(below, loads["iter"], shares * experts, "PuOr_r", 2)
    bar = figure.colorbar(image, ax=below, ticks=[0, 1, 2], pad=0.01, aspect=12)
    bar.set_ticklabels(["none", "balanced", "≥ double"])
    bar.outline.set_visible(False)


def _plot_imbalance(axes: Axes, logs: dict[str, DataFrame]) -> None:
    style_axes(axes, "Expert load, and its imbalance in the worst layer (1 is balanced)", "imbalance")
    axes.axhline(1, color=GREY, linewidth=1)
    for colour, log in zip(cycle(RUN_COLOURS), logs.values(), strict=False):
        plot_line(axes, log["iter"], smooth(log["load_imbalance"]), color=colour)
    axes.margins(y=0.15)


def _mean_over_layers(layers: list[list[float]]) -> np.ndarray:
    """Return the mean load of each expert over the layers that have it."""
    return np.nanmean(np.array(list(zip_longest(*layers, fillvalue=np.nan))), axis=1)


def _title(logs: dict[str, DataFrame]) -> str:
    """Return the title: name, last step and losses of a single run, or the number of runs."""
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


def _read_baselines(path: Path) -> dict[str, float]:
    """Read `{"baselines": {name: loss}}` from a data.json; empty where the file or the key does not exist."""
    if not path.exists():
        return {}
    baselines: dict[str, float] = read(path, record({}, {"baselines": mapping(number())})).get("baselines", {})
    return baselines
