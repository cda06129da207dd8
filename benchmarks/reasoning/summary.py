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
    """Intervals over seeds of the accuracy, and of its difference from that of another method with the same seed.

    The other method is that of the stage before, or else the baseline. One row per method and number of steps, with the
    mean over the kinds, and rows for all numbers of steps and for each kind.
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
    """Draw accuracy over number of steps with intervals as a PNG, without third stages, which have few seeds."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    style_axes(axes, "Exact answers to problems of the test set", "share of exact answers")
    rows = summary[(summary["kind"] == "all") & (summary["steps"] != ALL)]
    methods = [method for method in rows["method"].unique() if " + " not in method]
    colours = dict(zip([m for m in methods if m != TEACHER], RUN_COLOURS, strict=False)) | {TEACHER: GREY}
    for number, method in enumerate(methods):
        own = rows[rows["method"] == method]
        places = own["steps"].astype(int) + 0.06 * (number - (len(methods) - 1) / 2)
        style = {"color": colours[method], "label": method, "capsize": 3, "marker": "o", "markersize": 5}
        axes.errorbar(places, own["mean"], yerr=own["ci95"].fillna(0), linewidth=1.5, **style)
    axes.set_xlabel("steps of the problem", color=INK)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    save_png(figure, out)
