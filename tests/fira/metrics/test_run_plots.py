"""Plots of one and several runs: the lines contain the values of the log, and Pillow reads the PNG."""

import json
import math
import runpy
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fira.metrics.csv_log import LOG_NAME, Row, TrainingLog, read_log
from fira.metrics.events import EventLog
from fira.metrics.plotted_run import PlottedRun
from fira.metrics.run_marks import Mark
from fira.metrics.run_plots import plot_files, plot_runs
from tests.launch import ROOT

BALANCED = [[0.25] * 4] * 2
SKEWED = [[0.7, 0.1, 0.1, 0.1], [0.3, 0.5, 0.1, 0.1]]  # mean over layers: 0.5, 0.3, 0.1, 0.1


def make_run(folder: Path, steps: int = 40, **changed: Any) -> Path:
    """Write a run folder with a loss that decreases from 7 to about 3 and a validation every tenth step."""
    folder.mkdir()
    names = [name for name in changed.get("metrics", ()) if not name.startswith("val_")]
    log = TrainingLog(folder / LOG_NAME, metrics=names)
    log.write_initial(7.5, {})
    for step in range(1, steps + 1):
        loss = 3 + 4 * math.exp(-step / 10)
        values: dict[str, Any] = {
            "train_loss": loss,
            "val_loss": loss + 0.1 if step % 10 == 0 else None,
            "lr": 1e-3,
            "mfu": 0.3,
            "tokens_per_s": 12e3,
            "grad_norm": 0.5,
            "expert_load": BALANCED,
        }
        log.write(Row(iter=step, **(values | changed)))
    log.close()
    return folder


def draw(logs: dict[str, Any], out: Path, baselines: dict[str, float] | None = None) -> Figure:
    runs = {name: PlottedRun(log) for name, log in logs.items()}
    return figure_of(lambda: plot_runs(runs, out, baselines or {}), out)


def figure_of(plot: Callable[[], Any], out: Path) -> Figure:
    """Call `plot` and return the figure that it saves."""
    figures: list[Figure] = []
    save = Figure.savefig

    def record(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **(options | {"dpi": 50}))

    with patch.object(Figure, "savefig", record):
        plot()
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # not a blank page
    return figures[0]


def axes_titled(figure: Figure, start: str) -> Any:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(start))


def line_labelled(axes: Any, label: str) -> Any:
    return next(line for line in axes.lines if line.get_label() == label)


def test_single_run_has_losses_baselines_and_a_title(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run", bubble=0.25) / LOG_NAME, 0)
    figure = draw({"my-run": log}, tmp_path / "p.png", {"unigram": 6.1, "trigram": 4.93})
    loss = axes_titled(figure, "Loss")
    validation = line_labelled(loss, "validation")
    assert list(validation.get_xdata()) == [0, 10, 20, 30, 40]
    np.testing.assert_allclose(validation.get_ydata(), [7.5, *(3.1 + 4 * np.exp([-1, -2, -3, -4]))], rtol=1e-6)
    assert [text.get_text().strip() for text in loss.texts] == ["trigram 4.93", "unigram 6.10"]
    title = "my-run: step 40, training loss 3.073, best validation loss 3.173 at step 40, pipeline bubble 25%"
    assert figure.get_suptitle() == title


def test_throughput_and_utilisation_have_their_units_and_do_not_overlap(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run") / LOG_NAME, 0)
    left = axes_titled(draw({"run": log}, tmp_path / "p.png"), "Throughput")
    right = next(axes for axes in left.figure.axes if axes is not left and axes.bbox.bounds == left.bbox.bounds)
    heights = []
    for axes, value in ((left, 12.0), (right, 30.0)):  # thousand tokens per second, percent
        np.testing.assert_allclose(axes.lines[-1].get_ydata(), value)
        heights.append(value / axes.get_ylim()[1])
    assert abs(heights[0] - heights[1]) > 0.2


def test_heat_map_is_the_mean_over_layers_relative_to_a_balanced_share(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run", expert_load=SKEWED) / LOG_NAME, 0)
    figure = draw({"run": log}, tmp_path / "p.png")
    [image] = [image for axes in figure.axes for image in axes.images]
    np.testing.assert_allclose(image.get_array(), np.tile([[2.0], [1.2], [0.4], [0.4]], 40))
    worst = axes_titled(figure, "Largest expert load").lines[-1]
    np.testing.assert_allclose(worst.get_ydata(), 2.8)


def test_run_on_preferences_has_a_panel_of_rewards_and_accuracy(tmp_path: Path) -> None:
    rewards = {"reward_chosen": 0.5, "reward_rejected": -0.7, "reward_accuracy": 0.8, "reward_margin": 1.2}
    metrics = rewards | {f"val_{name}": value / 2 for name, value in rewards.items()}
    log = read_log(make_run(tmp_path / "run", metrics=metrics) / LOG_NAME, 0)
    figure = draw({"run": log}, tmp_path / "p.png")
    left = axes_titled(figure, "Rewards")
    right = next(axes for axes in figure.axes if axes is not left and axes.bbox.bounds == left.bbox.bounds)
    for axes, label, value in ((left, "chosen", 0.5), (left, "rejected", -0.7), (right, "accuracy", 80)):
        lines = list(axes.lines)
        number = lines.index(line_labelled(axes, label))
        np.testing.assert_allclose(lines[number].get_ydata(), value)
        np.testing.assert_allclose(lines[number + 1].get_ydata(), value / 2)  # of validations
    assert axes_titled(figure, "Loss").get_ylabel() == "mean over pairs"
    shared = draw({"one": log, "two": log}, tmp_path / "p.png")
    assert not any(axes.get_title(loc="left").startswith("Rewards") for axes in shared.axes)


def test_layers_may_have_different_numbers_of_experts(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run", expert_load=[[0.5, 0.5], [0.1, 0.3, 0.6]]) / LOG_NAME, 0)
    figure = draw({"run": log}, tmp_path / "p.png")
    [image] = [image for axes in figure.axes for image in axes.images]
    np.testing.assert_allclose(image.get_array()[:, 0], [0.9, 1.2, 1.8])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 1},
        {"expert_load": ()},
        {"val_loss": None, "mfu": None, "aux_loss": None},
        {"train_loss": math.nan, "grad_norm": math.inf, "tokens_per_s": math.nan, "val_loss": math.nan},
        {"lr": 0.0, "grad_norm": 0.0},
    ],
    ids=["one row", "dense", "empty columns", "nan and inf", "zeros"],
)
def test_unusual_logs_are_plotted_single_and_in_a_comparison(tmp_path: Path, changed: dict[str, Any]) -> None:
    unusual = read_log(make_run(tmp_path / "unusual", **changed) / LOG_NAME, 0)
    draw({"unusual": unusual}, tmp_path / "single.png")
    draw({"plain": read_log(make_run(tmp_path / "plain") / LOG_NAME, 0), "unusual": unusual}, tmp_path / "both.png")


def test_single_point_is_plotted_as_a_dot(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run", steps=1) / LOG_NAME, 0)
    line = line_labelled(axes_titled(draw({"run": log}, tmp_path / "p.png"), "Loss"), "training")
    assert line.get_marker() == "o"


def test_line_connects_values_between_empty_cells(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run", expert_load=SKEWED) / LOG_NAME, 0)
    log.loc[log["iter"] % 10 != 0, ["expert_load", "load_imbalance"]] = None
    line = axes_titled(draw({"run": log}, tmp_path / "p.png"), "Largest expert load").lines[-1]
    np.testing.assert_allclose(line.get_xydata(), [(step, 2.8) for step in (10, 20, 30, 40)])


def test_long_log_is_downsampled(tmp_path: Path) -> None:
    short = read_log(make_run(tmp_path / "run") / LOG_NAME)
    long = short.loc[short.index.repeat(2500)].assign(iter=range(1, 100_001))
    figure = draw({"run": long}, tmp_path / "p.png")
    steps = line_labelled(axes_titled(figure, "Loss"), "training").get_xdata()
    assert len(steps) <= 2000
    assert (steps[0], steps[-1]) == (1, 100_000)


def test_few_validations_have_a_marker_each_and_many_share_40(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run", steps=2000) / LOG_NAME, 0)
    for steps, count in ((20, 3), (2000, 201)):  # a validation every tenth step, and the one before the first
        figure = draw({"run": log[log["iter"] <= steps]}, tmp_path / "p.png")
        validation = line_labelled(axes_titled(figure, "Loss"), "validation")
        assert len(validation.get_xdata()) == count
        markers = len(range(0, count, validation.get_markevery()))
        assert markers == count or 30 <= markers <= 40


def test_legend_is_above_the_panel_and_covers_no_baseline(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run") / LOG_NAME, 0)
    loss = axes_titled(draw({"run": log}, tmp_path / "p.png", {"unigram": 6.9}), "Loss")
    assert loss.get_legend().get_window_extent().y0 >= loss.bbox.y1


def test_resumes_are_marked_in_every_panel_over_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for step, layout in ((0, "pp 4 × dp 1 (ep 1)"), (20, "pp 2 × dp 2 (ep 2)")):
        EventLog(run).append("train", step=step, layout=layout)
    figure = figure_of(lambda: plot_files([run]), run / "training_progress.png")
    loss = axes_titled(figure, "Loss")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["1: resumed after step 20, layout pp 2 × dp 2 (ep 2)"]
    assert [text.get_text() for text in loss.texts] == ["1"]
    for title in ("Loss", "Learning rate", "Throughput", "Largest expert load"):
        assert [20.5, 20.5] in [list(line.get_xdata()) for line in axes_titled(figure, title).lines]


@pytest.mark.parametrize(
    ("count", "first", "distance"), [(1, 1, 1), (1, 199, 1), (3, 100, 9), (10, 5, 20), (10, 100, 2)]
)
def test_numbers_of_marks_cover_neither_curves_nor_legends(
    tmp_path: Path, count: int, first: int, distance: int
) -> None:
    log = read_log(make_run(tmp_path / "run", steps=200) / LOG_NAME, 0)
    log["train_loss"] = 6.9  # at the upper edge of the panel
    layout = "pp 256 × dp 1,024 (ep 1,024)"
    marks = [Mark(first + n * distance, ("resumed", "rollback")[n % 2], layout) for n in range(count)]
    figure = figure_of(lambda: plot_runs({"run": PlottedRun(log, marks)}, tmp_path / "p.png", {}), tmp_path / "p.png")
    loss = axes_titled(figure, "Loss")
    numbers = [text.get_window_extent() for text in loss.texts]
    assert len(numbers) >= min(count, 2)
    assert not any(one.overlaps(other) for one, other in combinations(numbers, 2))
    assert not any(box.overlaps(loss.get_legend().get_window_extent()) for box in numbers)
    for line in (line_labelled(loss, "training"), line_labelled(loss, "validation")):
        points = loss.transData.transform(line.get_xydata())
        assert max(points[1:, 1]) < min(box.y0 for box in numbers)  # without row 0
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    assert legend.y1 < min(axes.get_tightbbox().y0 for axes in figure.axes)


def test_labels_of_equal_baselines_do_not_overlap(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run") / LOG_NAME, 0)
    baselines = {"unigram": 4.95, "bigram": 4.94, "trigram": 4.93}
    for runs, title in ({"one": log}, "Loss"), ({"one": log, "two": log}, "Validation loss"):
        axes = axes_titled(draw(runs, tmp_path / "p.png", baselines), title)
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 3
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_utilisation_is_at_most_100_percent(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run", mfu=0.82) / LOG_NAME, 0)
    left = axes_titled(draw({"run": log}, tmp_path / "p.png"), "Throughput")
    right = next(axes for axes in left.figure.axes if axes is not left and axes.bbox.bounds == left.bbox.bounds)
    assert right.get_ylim()[1] == 100
    assert abs(12 / left.get_ylim()[1] - 0.82) > 0.2  # the lines are apart


def test_default_paths_and_common_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    (one / "data.json").write_text(json.dumps({"baselines": {"unigram": 6.1, "trigram": 4.9}, "tokens": 5}))
    (two / "data.json").write_text(json.dumps({"baselines": {"unigram": 6.1, "trigram": 5.0}}))
    monkeypatch.chdir(tmp_path)
    with patch("fira.metrics.run_plots.plot_runs") as drawn:
        assert plot_files([one]) == one / "training_progress.png"
        assert plot_files([one / LOG_NAME, two]) == Path("comparison.png")
    single, both = (call.args for call in drawn.call_args_list)
    assert (list(single[0]), single[2]) == (["one"], {"unigram": 6.1, "trigram": 4.9})
    assert (list(both[0]), both[2]) == (["one", "two"], {"unigram": 6.1})


def test_runs_with_equal_names_are_distinguished_by_path(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        make_run(tmp_path / parent / "run")
    with patch("fira.metrics.run_plots.plot_runs") as drawn:
        plot_files([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert list(drawn.call_args.args[0]) == ["run", str(tmp_path / "b" / "run" / LOG_NAME)]


SCRIPT = ROOT / "scripts" / "plot.py"


def test_script_prints_the_path_of_the_plot(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    command = [sys.executable, str(SCRIPT), "run", "--out", "picture.png"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "picture.png\n", "")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["run", "--out", "p.pdf"], "p.pdf"),
        (["run", "--out", "no/such/p.png"], "no/such/p.png"),
        (["empty"], "no step"),
        (["broken"], "data.json"),
        (["garbled"], "expert_load"),
        (["--experts", "run", "broken"], "one run"),
        (["--experts", "dense"], "no step with experts"),
    ],
)
def test_invalid_input_ends_with_a_one_line_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    make_run(tmp_path / "run", steps=2)
    make_run(tmp_path / "empty", steps=0)
    make_run(tmp_path / "dense", steps=2, expert_load=())
    (make_run(tmp_path / "broken", steps=2) / "data.json").write_text('{"baselines": [6.1]}')
    log = make_run(tmp_path / "garbled", steps=2) / LOG_NAME
    log.write_text(log.read_text().replace("0.250 0.250", "0.250 x"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
