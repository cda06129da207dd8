"""The fastest layouts of a model, as `fira plan` prints them."""

import dataclasses
import logging
from argparse import Namespace

import torch

import pipeline
from fira.devices import choose_devices, choose_precision
from fira.errors import UserError
from fira.metrics.timeline_plot import write_timeline
from fira.models.registry import build, make_config
from fira.planner.best_candidates import plan_for, plan_here
from fira.planner.device_specs import load
from fira.planner.model_profile import profile_of
from fira.planner.plan_report import command_line, describe_plan
from fira.training.auto_layout import constraints_of
from fira.training.config import PLANNED, TrainConfig
from fira.training.flags import given_flags

logger = logging.getLogger(__name__)


def plan(config: TrainConfig, options: Namespace, world: pipeline.World | None) -> None:
    """Print the best candidates for this machine, measured by all ranks of `world`, or for a described device."""
    with torch.device("meta"):
        model = build(make_config(config.model, config.model_changes()))
    profile = profile_of(model, config.optimizer_settings().optimizer)
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
        result, hardware = plan_here(profile, constraints, precision, options.ranks, device, world, options.top)
    else:
        hardware = load(options.device)
        precision = hardware.fastest_precision() if config.precision == "auto" else config.precision
        result = plan_for(profile, constraints, precision, options.ranks, hardware, options.top)
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
