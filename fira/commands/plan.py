"""Find the fastest layout of a model for a number of ranks before a run.

With `--device this` the layers are measured on this machine, and under mpirun also the links between its ranks. For
another device, costs are computed from its description: `--model rish-base --ranks 16384 --device h200`.
"""

import dataclasses
import logging
from argparse import Namespace
from collections.abc import Sequence

import torch

import pipeline
from fira import cli
from fira.devices import choose_devices, choose_precision
from fira.errors import UserError
from fira.metrics.timeline_plot import write_timeline
from fira.models.registry import build, make_config
from fira.planner.best_candidates import plan_for, plan_here
from fira.planner.device_specs import load
from fira.planner.plan_report import command_line, describe_plan
from fira.training.auto_layout import constraints_of
from fira.training.config import TrainConfig
from fira.training.flags import add_options, given_flags
from fira.value_types import PathName, Size
from pipeline.mpi.world import launched_rank

PLANNED = ("micro_batch_size", "pp", "dp", "ep", "schedule", "recompute", "shard")
KEYS = ("model", "model_set", "vocab_size", "seq_len", "batch_size", "precision", *PLANNED)

logger = logging.getLogger(__name__)


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
    world = pipeline.init() if options.device == "this" or launched_rank() is not None else None
    cli.start_logging(options.quiet, options.verbose, world.rank if world else 0)
    plan(options, world)


def plan(options: Namespace, world: pipeline.World | None) -> None:
    """Print the best candidates for this machine, measured by all ranks of `world`, or for a described device."""
    config = TrainConfig(**{key: getattr(options, key) for key in KEYS})
    with torch.device("meta"):
        model = build(make_config(config.model, config.model_changes()))
    batch = config.recipe().batch_size
    if config.batch_size is None and batch < options.ranks:
        batch = options.ranks
        logger.info("the recipe's batch is smaller than the number of ranks; planned for %s sequences", f"{batch:,}")
    config = dataclasses.replace(config, batch_size=batch)
    constraints = constraints_of(config, batch)
    if options.device == "this":
        assert world
        device = choose_devices("auto", None, world.local_rank)[0]
        precision = choose_precision(config.precision, [device])
        result, hardware = plan_here(model, constraints, precision, options.ranks, device, world, options.top)
    else:
        hardware = load(options.device)
        precision = hardware.fastest_precision() if config.precision == "auto" else config.precision
        result = plan_for(model, constraints, precision, options.ranks, hardware, options.top)
    if world and world.rank > 0:
        return
    command = given_flags(config, without=PLANNED)
    print(describe_plan(result, hardware, precision, batch * model.config.seq_len, command))
    if options.timeline:
        best = result.best[0]
        if best.timeline is None:
            raise UserError(
                f"--timeline: {best.candidate.schedule} over {best.candidate.layout.pp} ranks is not simulated"
            )
        print("picture:", write_timeline(best.timeline, options.timeline, command_line(best.candidate, [])))
