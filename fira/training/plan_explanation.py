"""The answer to `--plan explain`: the candidates of the planner, and the one that a run would use."""

from dataclasses import replace

import torch

from fira.checkpoint.pretrained import open_saved
from fira.devices import choose_devices, choose_precision
from fira.models.adapters import add_adapters
from fira.models.registry import build
from fira.training.auto_layout import plan_layout
from fira.training.config import TrainConfig
from fira.training.setup import choose_model
from pipeline.mpi import World


def explain_plan(config: TrainConfig, world: World) -> None:
    """Print the candidates with their predicted and measured seconds on rank 0 (collective)."""
    devices = choose_devices(config.device, config.local_devices, world.local_rank)
    config = replace(config, precision=choose_precision(config.precision, devices))
    saved = open_saved(config.init) if config.init else None
    model_config, _ = choose_model(config, saved)
    with torch.device("meta"):
        model = build(model_config)
        if lora := config.adapters():
            add_adapters(model, lora)
    plan = plan_layout(config, model, config.recipe().batch_size, devices, world)
    if world.rank == 0:
        print(plan.table(), f"chosen: {plan}", sep="\n\n")
