"""Find the fastest layout of a model for a number of ranks before a run.

With `--device this` the layers are measured on this machine, and under mpirun also the links between its ranks. For
another device, costs are computed from its description: `--model rish-base --ranks 16384 --device h200`.
"""

from collections.abc import Sequence

import pipeline
from fira import cli
from fira.training.config import PLANNED, TrainConfig
from fira.training.flags import add_options
from fira.value_types import PathName, Size
from pipeline.mpi.launchers import launched_rank

KEYS = ("model", "model_set", "vocab_size", "seq_len", "batch_size", "optimizer", "precision", *PLANNED)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_options(parser, KEYS)
    parser.add_argument("--ranks", type=Size, required=True, help="number of ranks of the run")
    parser.add_argument(
        "--device",
        type=PathName,
        default="this",
        help="this, h200, h100, a100, t4 or a TOML file (default: %(default)s)",
    )
    parser.add_argument("--top", type=int, default=10, help="number of candidates shown (default: %(default)s)")
    parser.add_argument(
        "--timeline", type=PathName, metavar="JSON", help="write the best candidate's timeline as trace events and PNG"
    )
    parser.add_verbosity()
    options = parser.parse_args(arguments)
    from fira.commands.layout_plan import plan

    world = pipeline.init() if options.device == "this" or launched_rank() is not None else None
    cli.start_logging(options.quiet, options.verbose, world.rank if world else 0)
    plan(TrainConfig(**{key: getattr(options, key) for key in KEYS}), options, world)
