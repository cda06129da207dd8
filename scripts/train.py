"""Train a Mixture-of-Experts language model, split into pipeline stages over the ranks of mpirun.

Without arguments: a small model on the Python standard library's source. `mpirun -np 4 python scripts/train.py`
"""

from typing import NoReturn

import pipeline
from fira import cli
from fira.training.config import TrainConfig, add_options
from fira.training.loop import train


def main() -> None:
    parser = cli.Parser(__doc__, speaks=lambda: pipeline.init().rank == 0)
    add_options(parser)
    settings = vars(parser.parse_args())
    settings.pop("config")
    config = TrainConfig(**settings)
    train(config, pipeline.init(config.timeout))


def fail(message: str, status: int) -> NoReturn:
    """End all ranks. They may not know one another yet: the flags that say how to start may be what is wrong."""
    pipeline.init()
    pipeline.fail(message, status)


if __name__ == "__main__":
    cli.run(main, fail)
