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
from fira.planner.model_profile import ModelProfile, profile_of
from fira.planner.plan_report import command_line, describe_plan, describe_seconds, recompute_flag
from fira.planner.step_timeline import step_timeline
from fira.training.auto_layout import constraints_of
from fira.training.config import PLANNED, TrainConfig
from fira.training.flags import given_flags

logger = logging.getLogger(__name__)


def plan(config: TrainConfig, options: Namespace, world: pipeline.World | None) -> None:
    """Print the best candidates for this machine, measured by all ranks of `world`, or for a described device."""
    config, profile = with_batch(config, options.ranks)
    batch = config.recipe().batch_size
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
    print(describe_plan(result, hardware, precision, batch * profile.tokens, command))
    if options.timeline:
        best = result.best[0]
        if best.timeline is None:
            raise UserError(
                f"--timeline: {best.candidate.schedule} over {best.candidate.layout.pp} ranks is not simulated"
            )
        ranks = f"{options.ranks:,} rank{'s' * (options.ranks != 1)}"
        planned = (
            f"{config.name()} on {ranks} of {hardware.name} in {precision}, {describe_seconds(best.seconds)} per step"
        )
        title = f"{planned}: {command_line(best.candidate, command)}"
        timeline, phases, rows = step_timeline(best)
        print("picture:", write_timeline(timeline, options.timeline, title, phases, rows))


def plan_in_advance(
    config: TrainConfig, device: str, nodes: int, ranks_per_node: int | None
) -> tuple[TrainConfig, int, str]:
    """Choose the layout for nodes of a described device.

    Return the settings with the layout, the number of ranks per node, and a description of the layout.
    """
    hardware = load(device, "--hardware")
    hardware = dataclasses.replace(hardware, ranks_per_node=ranks_per_node or hardware.ranks_per_node)
    ranks = nodes * hardware.ranks_per_node
    config, profile = with_batch(config, ranks)
    precision = hardware.fastest_precision() if config.precision == "auto" else config.precision
    constraints = constraints_of(config, config.recipe().batch_size)
    best = plan_for(profile, constraints, precision, ranks, hardware, 1).best[0]
    candidate = best.candidate
    layout = candidate.layout
    planned = dataclasses.replace(
        config,
        pp=layout.pp,
        dp=layout.dp,
        ep=layout.ep,
        schedule=candidate.schedule,
        micro_batch_size=candidate.microbatch,
        shard=candidate.shard,
        recompute=recompute_flag(candidate),
    )
    return planned, hardware.ranks_per_node, f"{layout}, about {best.seconds:.3g} s per step on {hardware.name}"


def with_batch(config: TrainConfig, ranks: int) -> tuple[TrainConfig, ModelProfile]:
    """The settings with a batch size of at least one sequence per rank, and the profile of their model."""
    with torch.device("meta"):
        model = build(make_config(config.model, config.model_changes()))
    batch = config.recipe().batch_size
    if config.batch_size is None and batch < ranks:
        batch = ranks
        logger.info("the recipe's batch is smaller than the number of ranks; planned for %s sequences", f"{batch:,}")
    return dataclasses.replace(config, batch_size=batch), profile_of(model, config.optimizer_settings().optimizer)
