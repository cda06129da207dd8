"""Find how a model is best spread over ranks before any of them runs.

`python scripts/plan.py --model rish-base --ranks 16384 --device h200`. On `this` machine layers and links are measured,
links between the ranks of mpirun where it is started by it; of another device they follow from its figures.
"""

import dataclasses

import torch

import pipeline
from fira import cli
from fira.devices import choose_devices
from fira.errors import UserError
from fira.metrics.timeline_plot import write_timeline
from fira.models.registry import build, make_config
from fira.planner.plan import plan_for, plan_here
from fira.planner.plan_report import command_line, describe
from fira.training.auto_layout import constraints_of
from fira.training.config import TrainConfig, add_options, given_flags

PLANNED = ("micro_batch_size", "pp", "dp", "ep", "schedule", "recompute")
KEYS = ("model", "model_set", "vocab_size", "seq_len", "batch_size", "precision", *PLANNED)


def main() -> None:
    parser = cli.Parser(__doc__)
    add_options(parser, KEYS)
    parser.add_argument("--ranks", type=int, required=True, help="how many there will be")
    parser.add_argument("--device", default="this", help="this, h200, a100, t4 or a TOML file (default: %(default)s)")
    parser.add_argument("--top", type=int, default=10, help="how many to show (default: %(default)s)")
    parser.add_argument("--timeline", metavar="JSON", help="write the best one's schedule as trace events, and a PNG")
    options = parser.parse_args()
    if min(options.ranks, options.top) < 1:
        raise UserError("--ranks and --top must be greater than 0")
    config = TrainConfig(**{key: getattr(options, key) for key in KEYS})
    with torch.device("meta"):
        model = build(make_config(config.model, config.model_changes()))
    batch = config.recipe().batch_size
    if config.batch_size is None and batch < options.ranks:
        batch = options.ranks
        print(f"the recipe's batch is smaller than the number of ranks; planned for {batch:,} sequences")
    config = dataclasses.replace(config, batch_size=batch)
    constraints = constraints_of(config, batch)
    if options.device == "this":
        world = pipeline.init()
        device = choose_devices("auto", None, world.local_rank)[0]
        found, hardware = plan_here(model, constraints, config.precision, options.ranks, device, world, options.top)
        if world.rank > 0:
            return
    else:
        found, hardware = plan_for(model, constraints, config.precision, options.ranks, options.device, options.top)
    flags = given_flags(config, without=PLANNED)
    print(describe(found, hardware, batch * model.config.seq_len, flags))
    if options.timeline:
        best = found.best[0]
        if best.timeline is None:
            raise UserError(
                f"--timeline: {best.candidate.schedule} over {best.candidate.layout.pp} ranks is not simulated"
            )
        print("picture:", write_timeline(best.timeline, options.timeline, command_line(best.candidate, [])))


if __name__ == "__main__":
    cli.run(main)
