"""Bar chart of the accuracies of tasks with their standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fira.errors import UserError
from fira.evaluation.task_scores import Score, TaskScores
from fira.metrics.plot_style import GREY, INK, RUN_COLOURS, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR, GAP = 0.28, 0.35  # height of a bar, and space between two tasks, in inches
SHARES = ("acc", "exact_match")  # metrics from 0 to 1 begin with one of these names


def plot_scores(results: Sequence[TaskScores], title: str, out: Path) -> None:
    """Draw a bar for each accuracy to the PNG `out`; a tick marks chance.

    Raises UserError if no score is an accuracy, and for a path that cannot be written.
    """
    from matplotlib.figure import Figure

    bars = [(result, shares) for result in results if (shares := _shares(result))]
    if not bars:
        raise UserError(f"--plot {out}: no task reports an accuracy; leave the flag out")
    metrics = list(dict.fromkeys(metric for _, shares in bars for metric in shares))
    colours = {metric: RUN_COLOURS[number % len(RUN_COLOURS)] for number, metric in enumerate(metrics)}
    height = sum(len(shares) * BAR + GAP for _, shares in bars)
    figure = Figure(figsize=(8, height + 1.4), layout="constrained")
    axes = figure.add_subplot()
    position, centres = 0.0, []
    for result, shares in bars:
        centres.append(position + (len(shares) - 1) * BAR / 2)
        for metric, score in shares.items():
            axes.barh(
                position,
                score.value,
                height=0.9 * BAR,
                xerr=score.error,
                color=colours[metric],
                error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 3},
            )
            right = min(1.0, score.value + (score.error or 0)) + 0.015
            axes.text(right, position, f"{score.value:.3f}", va="center", color=INK, fontsize=9)
            if result.chance and metric.startswith("acc"):
                ends = position - BAR / 2, position + BAR / 2
                axes.plot([result.chance] * 2, ends, color=INK, linestyle=(0, (2, 1.5)), linewidth=1.2)
            position += BAR
        position += GAP
    axes.set_yticks(centres, [f"{result.task}\n{result.examples:,} examples" for result, _ in bars], color=INK)
    axes.invert_yaxis()
    _style(axes, title)
    handles = [axes.barh(0, 0, color=colour, label=metric) for metric, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    save_png(figure, out)


def _style(axes: Axes, title: str) -> None:
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel("share of examples, with standard error; dashed: chance", color=GREY)


def _shares(result: TaskScores) -> dict[str, Score]:
    """The scores from 0 to 1."""
    return {metric: score for metric, score in result.scores.items() if metric.startswith(SHARES)}
