"""Completion of a training run's settings by the planner."""

from dataclasses import replace

import torch

from fira.models.language_model import LanguageModel
from fira.planner.best_candidates import plan_here
from fira.planner.candidates import Constraints
from fira.planner.plan_report import recompute_flag
from fira.training.config import TrainConfig
from pipeline.mpi import World


def constraints_of(config: TrainConfig, batch: int) -> Constraints:
    """The given settings as constraints of the planner."""
    return Constraints(
        batch,
        config.pp,
        config.dp,
        config.ep,
        config.schedule,
        config.micro_batch_size,
        config.recomputed(),
        config.shard,
    )


def with_plan(config: TrainConfig, model: LanguageModel, batch: int, device: torch.device, world: World) -> TrainConfig:
    """The settings, of which missing ones are taken from the best candidate (collective). model: on the meta device."""
    constraints = constraints_of(config, batch)
    result, _ = plan_here(model, constraints, config.precision, world.size, device, world, limit=1)
    candidate = result.best[0].candidate
    return replace(
        config,
        pp=candidate.layout.pp,
        dp=candidate.layout.dp,
        ep=candidate.layout.ep,
        schedule=candidate.schedule,
        micro_batch_size=candidate.microbatch,
        recompute=recompute_flag(candidate),
        shard=candidate.shard,
    )
