"""Train a Mixture-of-Experts language model, split into pipeline stages over the ranks of mpirun.

Without arguments: a small model on the source of the Python standard library. With --elastic or --max-restarts, and
without mpirun, the command starts the ranks itself and restarts them after a failure.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pipeline
from fira import cli
from fira.errors import UserError
from fira.supervisor.supervise import Supervisor
from fira.training.config import SUPERVISED, TrainConfig, add_options
from fira.training.loop import train
from pipeline.mpi.world import launched_rank


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_options(parser)
    parser.add_verbosity()
    settings = vars(parser.parse_args(arguments))
    del settings["config"]
    quiet, verbose = settings.pop("quiet"), settings.pop("verbose")
    config = TrainConfig(**settings)
    if any(settings[name] is not None for name in SUPERVISED):
        supervise(config, quiet, verbose)
        return
    world = pipeline.init(config.timeout, cuda=config.device != "cpu")
    cli.start_logging(quiet, verbose, world.rank)
    train(config, world, quiet)


def supervise(config: TrainConfig, quiet: bool, verbose: bool) -> None:
    """Start this command on the ranks of a launcher until the run has ended."""
    if launched_rank() is not None:
        raise UserError("--elastic and --max-restarts start the ranks themselves; run the command without mpirun")
    cli.start_logging(quiet, verbose)
    program = [sys.executable, sys.argv[0], *(["train"] if Path(sys.argv[0]).name == "fira" else [])]
    flags = [flag for flag, given in (("--quiet", quiet), ("--verbose", verbose)) if given]
    if status := Supervisor(config, program, flags).run():
        sys.exit(status)
