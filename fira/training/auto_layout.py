"""The planner's choices for a training run: whatever the settings leave out."""

from dataclasses import replace
from typing import Any

import torch

from fira.planner.candidates import Constraints
from fira.planner.plan import plan_here
from fira.planner.plan_report import recomputed
from fira.training.config import TrainConfig
from pipeline.mpi import World


def constraints_of(config: TrainConfig, batch: int) -> Constraints:
    """What the settings give; None for what they leave open."""
    return Constraints(
        batch, config.pp, config.dp, config.ep, config.schedule, config.micro_batch_size, config.recomputed()
    )


def with_plan(config: TrainConfig, model: Any, batch: int, device: torch.device, world: World) -> TrainConfig:
    """The settings, completed by the best candidate (collective). model: its config."""
    constraints = constraints_of(config, batch)
    found, _ = plan_here(model, constraints, config.precision, world.size, device, world, most=1)
    candidate = found.best[0].candidate
    return replace(
        config,
        pp=candidate.layout.pp,
        dp=candidate.layout.dp,
        ep=candidate.layout.ep,
        schedule=candidate.schedule,
        micro_batch_size=candidate.microbatch,
        recompute=recomputed(candidate),
    )
