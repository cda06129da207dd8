"""Draw the training log of a run, or of several runs over each other."""

import argparse
import sys
from pathlib import Path

from fira.errors import UserError
from fira.training.plots import plot_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
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
    try:
        print(plot_files(arguments.runs, arguments.out))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
