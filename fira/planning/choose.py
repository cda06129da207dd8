"""The planner for a training run: what was left out of its settings is chosen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fira.errors import UserError
from fira.planning.costs import estimate
from fira.planning.hardware import Hardware, load
from fira.planning.layers import shape_of
from fira.planning.measure import measure
from fira.planning.picture import draw_timelines
from fira.planning.search import Found, search
from fira.planning.ways import Wanted, ways
from fira.training.config import TrainConfig
from pipeline import World
from pipeline.simulate import Timeline
from pipeline.trace import write_trace


def wanted_of(config: TrainConfig, batch: int) -> Wanted:
    """What the settings leave open is None."""
    return Wanted(batch, config.pp, config.dp, config.ep, config.schedule, config.micro_batch_size, config.recompute)


def plan_here(
    config: TrainConfig, model: Any, batch: int, ranks: int, device: torch.device, world: World, most: int = 10
) -> tuple[Found, Hardware]:
    """The best ways on this machine, by measured costs (collective). model: its config."""
    shape, wanted = shape_of(model), wanted_of(config, batch)
    sizes = sorted({way.microbatch for way in ways(shape, ranks, wanted)})
    hardware, costs = measure(shape, sizes, config.precision, device, ranks, world)
    return search(shape, ranks, wanted, hardware, costs, config.precision, most), hardware


def plan_for(
    config: TrainConfig, model: Any, batch: int, ranks: int, device: str, most: int = 10
) -> tuple[Found, Hardware]:
    """The best ways on a described device."""
    shape, hardware = shape_of(model), load(device)
    if config.precision not in hardware.flops:
        raise UserError(
            f"--precision {config.precision}: {device} does not say its FLOP/s; it has {', '.join(hardware.flops)}"
        )
    costs = estimate(shape, hardware, config.precision)
    return search(shape, ranks, wanted_of(config, batch), hardware, costs, config.precision, most), hardware


def with_plan(config: TrainConfig, model: Any, batch: int, device: torch.device, world: World) -> TrainConfig:
    """The settings with the best way's filled in (collective)."""
    found, _ = plan_here(config, model, batch, world.size, device, world, most=1)
    way = found.best[0].way
    return replace(
        config,
        pp=way.layout.pp,
        dp=way.layout.dp,
        ep=way.layout.ep,
        schedule=way.schedule,
        micro_batch_size=way.microbatch,
        recompute=way.recompute,
    )


def write_timeline(timeline: Timeline, out: str, title: str) -> Path:
    """Write a trace, and a picture of it beside it; returns the picture's path."""
    path = Path(out)
    picture = path.with_suffix(".png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_trace(timeline, path, title)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; choose a path that can be written") from None
    draw_timelines({title: timeline}, picture)
    return picture
