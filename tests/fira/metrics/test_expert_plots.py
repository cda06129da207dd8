"""The plot of experts by layer, compared with the values of the log."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from fira.metrics.csv_log import LOG_NAME
from fira.metrics.expert_plots import plot_experts
from tests.fira.metrics.test_run_plots import SKEWED, figure_of, make_run


def test_each_layer_has_a_row_of_panels(tmp_path: Path) -> None:
    """Load relative to a balanced share, dropped fractions (zero for an empty cell) and entropy."""
    changed = {"expert_load": SKEWED, "layer_entropy": [[1.2], [0.7]]}
    run = make_run(tmp_path / "run", steps=3, expert_dropped=[[0.5, 0, 0, 0], [0, 0.25, 0, 0]], **changed)
    log = run / LOG_NAME
    log.write_text(log.read_text().replace("0.500 0.000 0.000 0.000;0.000 0.250 0.000 0.000", "", 1))
    figure = figure_of(lambda: plot_experts(run), run / "experts.png")
    images = [image.get_array() for axes in figure.axes[:6] for image in axes.images]  # by rows; the colour bars follow
    np.testing.assert_allclose(images[0], np.tile([[2.8], [0.4], [0.4], [0.4]], 3))
    np.testing.assert_allclose(images[1], [[0, 0.5, 0.5], [0] * 3, [0] * 3, [0] * 3])
    np.testing.assert_allclose(images[2], np.tile([[1.2], [2.0], [0.4], [0.4]], 3))
    np.testing.assert_allclose(images[3], [[0] * 3, [0, 0.25, 0.25], [0] * 3, [0] * 3])
    np.testing.assert_allclose(figure.axes[5].lines[-1].get_ydata(), [0.7] * 3)
    minimal = figure_of(lambda: plot_experts(make_run(tmp_path / "minimal")), tmp_path / "minimal" / "experts.png")
    assert sum(len(axes.images) for axes in minimal.axes) == 2  # without drops and entropies, only the load


@pytest.mark.parametrize(("layers", "columns"), [(1, 3), pytest.param(32, 1, marks=pytest.mark.slow)])
def test_labels_do_not_overlap_and_colour_bars_follow_the_panels(tmp_path: Path, layers: int, columns: int) -> None:
    load = [[0.25] * 4] * layers
    changed = {"expert_dropped": load, "layer_entropy": [[1.2]] * layers} if columns == 3 else {}
    run = make_run(tmp_path / "run", 2, expert_load=load, **changed)
    log = run / LOG_NAME
    log.write_text(log.read_text().replace("\n2,", "\n450000,"))
    figure = figure_of(lambda: plot_experts(run), run / "experts.png")
    panels, bars = figure.axes[: columns * layers], figure.axes[columns * layers :]
    for axes in (*panels[-columns:], *bars):
        boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        assert len(boxes) >= 3
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        assert min(box.y0 for box in boxes) >= 0
    rows = [axes.yaxis.label.get_window_extent() for axes in panels[::columns]]
    assert not any(one.overlaps(other) for one, other in combinations(rows, 2))
    gap = min(axes.get_tightbbox().y0 for axes in panels[-columns:]) - max(bar.bbox.y1 for bar in bars)
    assert 0 <= gap < 0.3 * figure.dpi
