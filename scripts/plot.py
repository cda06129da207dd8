"""Draw the training log of a run, or of several runs over each other."""

from pathlib import Path

from fira import cli
from fira.training.plots import plot_files


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_OR_CSV", help="a run folder, or its training_log.csv"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PNG",
        help="default: training_progress.png beside the log; for several runs, comparison.png in this folder",
    )
    arguments = parser.parse_args()
    print(plot_files(arguments.runs, arguments.out))


if __name__ == "__main__":
    cli.run(main)
