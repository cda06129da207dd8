"""The table and the picture of all runs in results.csv."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

HERE = Path(__file__).parent
TARGETS = {"corpus": 3.5, "characters": 1.88}  # nats per token
T_CRITICAL = {5: 3.747, 10: 2.821}  # by runs, of Student's t: p = 0.01, one-sided


def report(rows: pd.DataFrame) -> None:
    """Print the table and draw the picture."""
    print("| record | contender | runs | steps | seconds | final loss | below the target, p < 0.01 |")
    print("|---|---|---|---|---|---|---|")
    for (record, contender), part in rows.groupby(["record", "contender"], sort=False):
        final = part.sort_values("step").groupby("seed").last()
        mean, deviation, count = final["loss"].mean(), final["loss"].std(), len(final)
        below = "" if record not in TARGETS else _is_below(mean, deviation, count, TARGETS[record])
        print(
            f"| {record} | {contender} | {count} | {final['step'].max()} | {final['seconds'].median():.1f} "
            f"| {mean:.3f} ± {deviation:.3f} | {below} |"
        )
    draw(rows)


def _is_below(mean: float, deviation: float, count: int, target: float) -> str:
    if count not in T_CRITICAL:
        return f"needs {min(T_CRITICAL)} runs"
    t = (target - mean) / (deviation / math.sqrt(count))
    return f"{'yes' if t > T_CRITICAL[count] else 'no'} ({target})"


def draw(rows: pd.DataFrame) -> None:
    """Draw the validation loss over seconds: the mean of all seeds, and their range."""
    records = list(rows["record"].unique())
    figure, axes = plt.subplots(1, len(records), figsize=(6 * len(records), 4), squeeze=False)
    for axis, record in zip(axes[0], records, strict=True):
        for contender, part in rows[rows["record"] == record].groupby("contender", sort=False):
            steps = part.groupby("step").agg({"seconds": "median", "loss": ["mean", "min", "max"]})
            seconds, loss = steps["seconds"]["median"], steps["loss"]
            (line,) = axis.plot(seconds, loss["mean"], marker=".", label=contender)
            axis.fill_between(seconds, loss["min"], loss["max"], color=line.get_color(), alpha=0.2)
        if record in TARGETS:
            axis.axhline(TARGETS[record], color="gray", linestyle=":", label=f"target {TARGETS[record]}")
        axis.set(title=record, xlabel="seconds of training", ylabel="validation loss, nats per token")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(HERE / "results.png", dpi=110)
