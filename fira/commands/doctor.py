"""Say what this machine can do, and what to do about each problem.

With mpirun it also measures the links between ranks, and compares a training step of every schedule with one rank.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fira import cli
from fira.doctor import screen
from fira.errors import UserError
from pipeline.mpi.launchers import launched_rank

show_line = partial(print, flush=True)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    parser.add_argument("--gpu", action="store_true", help="test everything that uses a GPU, and write a report")
    gpu, launched = parser.parse_args(arguments).gpu, launched_rank() is not None
    if gpu and launched:
        raise UserError("--gpu starts ranks itself; start it without mpirun")
    # Modules that need torch are imported where they are used, because the screen reports a missing package.
    if gpu:
        from fira.doctor.gpu_report import examine_gpus

        usable = examine_gpus(train_program(), show_line)
    elif launched:
        from fira.doctor.rank_report import examine_ranks

        usable = examine_ranks(show_line)
    else:
        usable = screen.is_usable(screen.show(None, show_line))
    if not usable:
        sys.exit(1)


def train_program() -> tuple[str, ...]:
    """The words that start `fira train` or scripts/train.py, whichever belongs to the program that is running."""
    program = Path(sys.argv[0]).resolve()
    if program.name == "doctor.py":
        return sys.executable, str(program.with_name("train.py"))
    return sys.executable, str(program), "train"
