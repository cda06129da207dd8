"""Plot the logs of one run or of several: reads their folders and writes a PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fira.errors import UserError
from fira.metrics.baselines import read_baselines
from fira.metrics.comparison_plot import draw_comparison
from fira.metrics.csv_log import LOG_NAME, read_log
from fira.metrics.events import read_events
from fira.metrics.plot_style import save_png
from fira.metrics.plotted_run import PlottedRun
from fira.metrics.run_marks import marks_of
from fira.metrics.single_run_plot import draw_run


def plot_files(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Plot run folders or CSV files and return the path of the PNG.

    `out` defaults to `training_progress.png` in the folder of a single log, and to `comparison.png` in the current
    folder for several. Next to a log, resumes are read from `events.jsonl` and baselines from `data.json`,
    `{"baselines": {"unigram": 6.1}}`; with several runs, only baselines that are equal in all of them are drawn.
    """
    files = [path / LOG_NAME if path.is_dir() else path for path in paths]
    runs: dict[str, PlottedRun] = {}
    for file in files:
        is_run = file.name == LOG_NAME
        name = file.resolve().parent.name if is_run else file.stem
        marks = marks_of(read_events(file.parent)) if is_run else []
        runs[str(file) if name in runs else name] = PlottedRun(read_log(file, first=0), marks)
    baselines = [read_baselines(file.parent) for file in files]
    shared = {name: loss for name, loss in baselines[0].items() if all(other.get(name) == loss for other in baselines)}
    if out is None:
        out = files[0].with_name("training_progress.png") if len(files) == 1 else Path("comparison.png")
    plot_runs(runs, out, shared)
    return out


def plot_runs(runs: Mapping[str, PlottedRun], out: Path, baselines: Mapping[str, float]) -> None:
    """Plot named runs to the PNG `out`; `baselines` are losses in nats per token.

    Raises UserError for a log without steps and for a path that cannot be written.
    """
    for name, run in runs.items():
        if run.steps.empty:
            raise UserError(f"{name}: the log has no step yet; plot it after the first training step")
    finite = {name: run.finite() for name, run in runs.items()}
    if len(finite) == 1:
        [(name, run)] = finite.items()
        save_png(draw_run(name, run, baselines), out)
    else:
        save_png(draw_comparison(finite, baselines), out)
