"""The picture of several runs: one number per panel, and lines that can be told apart."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fira.metrics.csv_log import LOG_NAME, read_log
from fira.metrics.plot_style import RUN_COLOURS, run_styles
from fira.metrics.plotted_run import PlottedRun
from fira.metrics.run_marks import Mark
from fira.metrics.run_plots import plot_runs
from tests.fira.metrics.test_run_plots import axes_titled, figure_of, make_run

# How people without one kind of cones see linear RGB: Machado et al. 2009, severity 1.
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}

MARKS = [Mark(20, "resumed"), Mark(25, "rollback"), Mark(30, "resumed", "pp 1 × dp 4")]


def compare(tmp_path: Path, count: int, **changed: object) -> Figure:
    runs = {}
    for number in range(count):
        log = read_log(make_run(tmp_path / f"run-{number}", mfu=0.7, **changed) / LOG_NAME, 0)
        runs[f"run-{number}"] = PlottedRun(log, MARKS if number == 1 else [])
    return figure_of(lambda: plot_runs(runs, tmp_path / "p.png", {"unigram": 6.1}), tmp_path / "p.png")


def test_each_number_has_a_panel_with_a_line_per_run(tmp_path: Path) -> None:
    figure = compare(tmp_path, 8, expert_load=[[0.7, 0.1, 0.1, 0.1], [0.3, 0.5, 0.1, 0.1]])
    assert len(figure.axes) == 8
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*(f"run-{number}" for number in range(8)), "resumed", "rollback"]
    shapes = dict(zip(names, (handle.get_marker() for handle in legend.legend_handles), strict=True))
    for title, value in {"Throughput": 12.0, "Utilisation": 70.0, "Gradient norm": 0.5, "Largest expert": 2.8}.items():
        axes = axes_titled(figure, title)
        lines = [line for line in axes.lines if len(line.get_xdata()) == 40]
        assert len(lines) == 8
        np.testing.assert_allclose(lines[0].get_ydata(), value)
    assert axes_titled(figure, "Utilisation").get_ylim()[1] <= 100
    unused = axes_titled(figure, "Experts with less than 0.5 ×").lines
    np.testing.assert_allclose(unused[0].get_ydata(), 100 * 5 / 8)
    validation = axes_titled(figure, "Validation loss").lines[1]
    assert (validation.get_xdata()[0], validation.get_ydata()[0]) == (0, 7.5)
    lines = axes_titled(figure, "Training").lines
    for kind, steps in {"resumed": [20, 30], "rollback": [25]}.items():
        marked = [line for line in lines if line.get_marker() == shapes[kind]]
        assert [float(line.get_xdata()[0]) for line in marked] == steps


def test_dense_models_have_no_panels_of_experts(tmp_path: Path) -> None:
    assert len(compare(tmp_path, 2, expert_load=()).axes) == 6


def test_styles_of_many_runs_differ() -> None:
    styles = run_styles(21)
    assert len({tuple(style.items()) for style in styles}) == 21
    assert {style["linestyle"] for style in styles[: len(RUN_COLOURS)]} == {"solid"}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_differ_for_colour_blind_readers(kind: str) -> None:
    """CIE 1976 ΔE of at least 15, six just noticeable differences, and a contrast with white of at least 2."""
    rgb = np.array([to_rgb(colour) for colour in RUN_COLOURS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.array(BLINDNESS[kind]).T).clip(0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = seen @ to_xyz.T / (to_xyz @ np.ones(3))
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1000 * np.eye(len(lab))
    assert distances.min() > 15
    assert (1.05 / (xyz[:, 1] + 0.05)).min() > 2
