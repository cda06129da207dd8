"""The picture of the results: the losses of each method on both texts, and on the answers to questions."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fira.metrics.plot_style import GREY, INK, RUN_COLOURS, save_png, style_axes

STAGES = {"text": "after training on text", "questions": "and then on questions"}


def draw(results: pd.DataFrame, out: Path) -> None:
    """Draw the means over seeds to a PNG, with the standard deviations as bars. results: as in results.csv."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    losses, answers = figure.subplots(1, 2, width_ratios=[3, 2])
    groups = results.groupby(["method", "trained_on"])[["domain_loss", "general_loss", "answer_loss"]]
    means, deviations = groups.mean(), groups.std().fillna(0)
    methods = results["method"].unique()
    colours = dict(zip(methods, [INK, *RUN_COLOURS], strict=False))
    draw_losses(losses, means, deviations, colours)
    draw_answers(answers, means["answer_loss"], deviations["answer_loss"], colours)
    save_png(figure, out)


def draw_losses(axes: Axes, means: pd.DataFrame, deviations: pd.DataFrame, colours: dict[str, str]) -> None:
    """One path per method: from the base model over the domain's text (filled) to its questions (open)."""
    style_axes(axes, "Loss on test text, nats per token", "general text: up is forgetting")
    axes.set_xlabel("domain: left is learning", color=INK)
    start = means.loc[("base", "text")]
    for method, colour in colours.items():
        points = [means.loc[(method, stage)] for stage in STAGES]
        path = points if method == "base" else [start, *points]
        axes.plot(
            [point["domain_loss"] for point in path],
            [point["general_loss"] for point in path],
            color=colour,
            linewidth=1,
            alpha=0.6,
        )
        for stage, point in zip(STAGES, points, strict=True):
            error = deviations.loc[(method, stage)]
            axes.errorbar(
                point["domain_loss"],
                point["general_loss"],
                xerr=error["domain_loss"],
                yerr=error["general_loss"],
                marker="o",
                markersize=8,
                color=colour,
                markerfacecolor=colour if stage == "text" else "white",
                linestyle="none",
                label=method if stage == "text" else None,
            )
    axes.errorbar([], [], marker="o", color=GREY, markerfacecolor="white", linestyle="none", label=STAGES["questions"])
    axes.axhline(start["general_loss"], color=GREY, linewidth=0.8, linestyle=(0, (2, 1.5)), zorder=0)
    axes.locator_params(axis="x", integer=False)
    axes.legend(frameon=False)


def draw_answers(axes: Axes, means: pd.Series, deviations: pd.Series, colours: dict[str, str]) -> None:
    """A point per method, with its value."""
    style_axes(axes, "Loss of the answers to validation questions", "")
    axes.set_xlabel("nats per token, after training on questions", color=INK)
    for number, (method, colour) in enumerate(colours.items()):
        value, error = means[(method, "questions")], deviations[(method, "questions")]
        style = {"marker": "o", "markersize": 8, "markerfacecolor": "white", "color": colour, "linestyle": "none"}
        axes.errorbar(value, number, xerr=error, **style)
        axes.text(value, number - 0.15, f"{value:.2f}", ha="center", va="bottom", fontsize=9, color=INK)
    axes.set_yticks(range(len(colours)), list(colours))
    axes.set_ylim(len(colours) - 0.5, -0.5)
    axes.locator_params(axis="x", integer=False)
    axes.margins(x=0.12)
