"""Train a Mixture-of-Experts language model, split into pipeline stages over the ranks of mpirun.

Without arguments: a small model on the source of the Python standard library.
"""

from collections.abc import Sequence

import pipeline
from fira import cli
from fira.training.config import TrainConfig, add_options
from fira.training.loop import train


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_options(parser)
    parser.add_verbosity()
    settings = vars(parser.parse_args(arguments))
    del settings["config"]
    quiet, verbose = settings.pop("quiet"), settings.pop("verbose")
    config = TrainConfig(**settings)
    world = pipeline.init(config.timeout, cuda=config.device != "cpu")
    cli.start_logging(quiet, verbose, world.rank)
    train(config, world, quiet)
