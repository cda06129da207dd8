"""The planner for a training run: what was left out of its settings is chosen."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fira.errors import UserError
from fira.planning.costs import estimate
from fira.planning.hardware import Hardware, load
from fira.planning.layers import shape_of
from fira.planning.measure import measure, memory_of
from fira.planning.picture import draw_timelines
from fira.planning.predict import Predictor
from fira.planning.report import recomputed
from fira.planning.search import Found, search
from fira.planning.ways import Wanted, Way, ways
from fira.training.config import TrainConfig
from pipeline import World
from pipeline.simulate import Timeline
from pipeline.trace import write_trace


def wanted_of(config: TrainConfig, batch: int) -> Wanted:
    """What the settings leave open is None."""
    return Wanted(batch, config.pp, config.dp, config.ep, config.schedule, config.micro_batch_size, config.recomputed())


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
        recompute=recomputed(way),
    )


def fewest_recomputed(config: TrainConfig, model: Any, way: Way, device: torch.device, local_ranks: int) -> int:
    """How many blocks of every stage are to be recomputed for this way to fit into this machine's memory."""
    shape, memory = shape_of(model), memory_of(device, local_ranks)
    here = Hardware("this machine", memory, math.inf, {config.precision: math.inf}, 0.0, local_ranks, {}, {})
    predictor = Predictor(shape, here, estimate(shape, here, config.precision, device.type), config.precision)
    if max(predictor.memory(way)) > memory:
        way = predictor.sparing(way)
    if (needed := max(predictor.memory(way))) > memory:
        raise UserError(
            f"--recompute auto: with all blocks recomputed a rank needs {needed / 1e9:.1f} GB and has "
            f"{memory / 1e9:.1f}; take more ranks, a larger --pp or a smaller --micro-batch-size"
        )
    return way.recompute


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
