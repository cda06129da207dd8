"""Draw the training log of one run, of several runs in one picture, or the experts of a run."""

from collections.abc import Sequence
from pathlib import Path

from fira import cli
from fira.errors import UserError
from fira.value_types import PathName

OUT = """default: training_progress.png or experts.png next to the log; for several runs, comparison.png in the current
folder"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    runs_help = "a run folder, or its training_log.csv"
    parser.add_argument("runs", nargs="+", type=PathName, metavar="RUN_OR_CSV", help=runs_help)
    parser.add_argument("--out", type=PathName, metavar="PNG", help=OUT)
    parser.add_argument("--experts", action="store_true", help="load, drops and router entropy of each expert")
    options = parser.start(arguments)
    from fira.metrics.expert_plots import plot_experts
    from fira.metrics.run_plots import plot_files

    runs, out = [Path(run) for run in options.runs], Path(options.out) if options.out else None
    if not options.experts:
        print(plot_files(runs, out))
    elif len(runs) > 1:
        raise UserError(f"--experts draws one run, not {len(runs)}; run it once for each")
    else:
        print(plot_experts(runs[0], out))
