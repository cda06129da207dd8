"""The picture of a disturbed run: loss, steps and running ranks over wall time, with kills and starts."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fira.metrics.plot_style import BLUE, GREEN, INK, VERMILLION, save_png, style_axes

BREAK_S = 4.0  # the line of the losses is interrupted where no step is completed for this long


def draw(
    samples: pd.DataFrame, kills: Sequence[Mapping[str, float]], events: Sequence[Mapping[str, Any]], out: Path
) -> None:
    """Draw a run to a PNG.

    samples: `time_s`, `step`, `train_loss`, `ranks`. kills: `time_s` of each. events: of events.jsonl.
    """
    begin = datetime.fromisoformat(events[0]["time"])
    starts = [(datetime.fromisoformat(e["time"]) - begin).total_seconds() for e in events if e["event"] == "start"]
    offset = samples.loc[samples["ranks"] > 0, "time_s"].iloc[0]  # time_s begins with the supervisor's own start
    starts = [seconds + offset for seconds in starts]
    figure = Figure(figsize=(11, 8), layout="constrained")
    loss, step, ranks = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    minutes = samples["time_s"] / 60
    style_axes(loss, "Training loss", "nats per token")
    rows = samples[samples["step"].diff() != 0]
    continued = rows["time_s"].diff() < BREAK_S
    loss.plot(rows["time_s"] / 60, rows["train_loss"].where(continued), color=BLUE, linewidth=1)
    style_axes(step, "Steps", "step")
    step.plot(minutes, samples["step"], color=BLUE, linewidth=1)
    style_axes(ranks, "Ranks", "running ranks")
    ranks.fill_between(minutes, samples["ranks"], step="post", color=BLUE, alpha=0.3, linewidth=0)
    ranks.set_ylim(0, samples["ranks"].max() + 0.5)
    for axes in (loss, step, ranks):
        axes.set_xlabel("")
        axes.set_xlim(0, float(minutes.iloc[-1]))
        _lines(axes, [kill["time_s"] / 60 for kill in kills], VERMILLION, "a rank is killed")
        _lines(axes, [seconds / 60 for seconds in starts[1:]], GREEN, "the supervisor starts a job")
    loss.legend(frameon=False, loc="upper right")
    ranks.set_xlabel("wall time in minutes", color=INK)
    figure.suptitle(f"{len(kills)} kills, {len(starts) - 1} restarts", fontsize=13, color=INK)
    save_png(figure, out)


def _lines(axes: Axes, times: Sequence[float], colour: str, label: str) -> None:
    """Thin vertical lines with one entry in the legend."""
    for number, minute in enumerate(times):
        axes.axvline(minute, color=colour, linewidth=0.8, alpha=0.7, zorder=0, label=label if number == 0 else None)
