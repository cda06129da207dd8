"""Draw the training log of a run, or of several runs over each other; or what a run's experts did."""

from pathlib import Path

from fira import cli
from fira.errors import UserError
from fira.metrics.expert_plots import plot_experts
from fira.metrics.run_plots import plot_files


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_OR_CSV", help="a run folder, or its training_log.csv"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PNG",
        help="default: training_progress.png or experts.png beside the log; for several runs, comparison.png here",
    )
    parser.add_argument("--experts", action="store_true", help="each expert of each layer: load, drops, router entropy")
    arguments = parser.parse_args()
    if not arguments.experts:
        print(plot_files(arguments.runs, arguments.out))
    elif len(arguments.runs) > 1:
        raise UserError(f"--experts draws one run, not {len(arguments.runs)}; call it once for each")
    else:
        print(plot_experts(arguments.runs[0], arguments.out))


if __name__ == "__main__":
    cli.run(main)
