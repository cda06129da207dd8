"""Train a Mixture-of-Experts language model, split into pipeline stages over the ranks of mpirun.

Without arguments: a small model on the Python standard library's source. `mpirun -np 4 python scripts/train.py`
"""

import pipeline
from fira import cli
from fira.training.config import TrainConfig, add_options
from fira.training.loop import train


def main() -> None:
    world = pipeline.init()
    parser = cli.Parser(__doc__, speaks=world.rank == 0)
    add_options(parser)
    settings = vars(parser.parse_args())
    settings.pop("config")
    train(TrainConfig(**settings), world)


if __name__ == "__main__":
    cli.run(main, pipeline.fail)
