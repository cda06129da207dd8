"""Means over seeds with confidence intervals, and the picture of a comparison."""

import math
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from fira.metrics.plot_style import GREY, INK, RUN_COLOURS, save_png, style_axes

BASELINE, TEACHER = "alone", "teacher"
ALL = "2–6"
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: pd.Series) -> tuple[float, float]:
    """Mean, and half the width of the 95 % confidence interval of the mean by Student's t distribution."""
    n = len(values)
    return values.mean(), math.nan if n < 2 else T_975[n - 1] * values.std() / math.sqrt(n)


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Intervals over seeds of the accuracy, and of its difference from another method with the same seed.

    It is the method in `compared_with`: of the stage before, or else the baseline.

    One row per method and number of steps, with the mean over the kinds, and rows for all numbers of steps and
    for each kind.
    """
    rows = []
    groups = [(str(steps), "all", group) for steps, group in scores.groupby("steps")]
    groups += [(ALL, str(kind), group) for kind, group in scores.groupby("kind")] + [(ALL, "all", scores)]
    for steps, kind, group in groups:
        table = group.groupby(["method", "seed"])["exact_match"].mean().unstack("method")
        for method in scores["method"].unique():
            values = table[method].dropna()
            mean, half = interval(values)
            row = {"method": method, "steps": steps, "kind": kind, "seeds": len(values), "mean": mean, "ci95": half}
            if method not in (BASELINE, TEACHER):
                row["compared_with"] = method.rpartition(" + ")[0] or BASELINE
                differences = (table[method] - table[row["compared_with"]]).dropna()
                row["difference"], row["difference_ci95"] = interval(differences)
            rows.append(row)
    return pd.DataFrame(rows)


def draw(summary: pd.DataFrame, out: Path) -> None:
    """Draw accuracy over number of steps, and over kinds, with intervals, as a PNG."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    methods = list(summary["method"].unique())
    colours = dict(zip([m for m in methods if m != TEACHER], RUN_COLOURS, strict=False)) | {TEACHER: GREY}
    by_steps = summary[(summary["kind"] == "all") & (summary["steps"] != ALL)]
    by_kind = summary[summary["kind"] != "all"]
    for axes, rows, column, title in (
        (left, by_steps, "steps", "Exact answers by number of steps"),
        (right, by_kind, "kind", "Exact answers by kind, 2 to 6 steps"),
    ):
        style_axes(axes, title, "share of exact answers")
        labels = list(rows[column].unique())
        for number, method in enumerate(methods):
            own = rows[rows["method"] == method]
            places = [labels.index(label) + 0.08 * (number - (len(methods) - 1) / 2) for label in own[column]]
            style = {"color": colours[method], "label": method, "capsize": 3, "marker": "o", "markersize": 5}
            line = "-" if axes is left else "none"
            axes.errorbar(places, own["mean"], yerr=own["ci95"].fillna(0), linestyle=line, linewidth=1.5, **style)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("steps of the problem" if axes is left else "", color=INK)
        axes.set_ylim(0, 1.02)
    left.legend(frameon=False, loc="lower left")
    save_png(figure, out)
