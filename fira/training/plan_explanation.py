"""The answer to `--plan explain`: the candidates of the planner, and the one that a run would use."""

from dataclasses import replace

from fira.devices import choose_devices, choose_precision
from fira.training.auto_layout import describe, is_planned, plan_layout
from fira.training.config import TrainConfig
from fira.training.setup import choose, choose_candidate
from pipeline.mpi import World


def explain_plan(config: TrainConfig, world: World, quiet: bool) -> None:
    """Print the candidates with their predicted and measured seconds on rank 0 (collective)."""
    devices = choose_devices(config.device, config.local_devices, world.local_rank)
    config = replace(config, precision=choose_precision(config.precision, devices))
    chosen = choose(config)
    config, model = chosen.config, chosen.model
    if is_planned(config, model, config.recipe().batch_size, devices, world):
        plan = plan_layout(config, model, config.recipe().batch_size, devices, world, quiet)
        text = f"{plan.table()}\n\nchosen: {plan}"
    else:
        candidate = choose_candidate(config, model, devices, world)
        text = f"chosen: {describe(candidate)}, without a measurement"
    if world.rank == 0:
        print(text)
