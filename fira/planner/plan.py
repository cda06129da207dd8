"""Plans for a model: the best candidates on this machine or on a described device, and what fits into memory."""

import math
from typing import Any

import torch

from fira.errors import UserError
from fira.planner.candidates import Candidate, Constraints, candidates
from fira.planner.costs import estimate
from fira.planner.device_specs import Hardware, load
from fira.planner.measure import measure, memory_of
from fira.planner.model_profile import profile_of
from fira.planner.search import SearchResult, search
from fira.planner.step_time import Predictor
from pipeline.mpi import World


def plan_here(
    model: Any,
    constraints: Constraints,
    precision: str,
    ranks: int,
    device: torch.device,
    world: World,
    most: int = 10,
) -> tuple[SearchResult, Hardware]:
    """The best candidates on this machine, by measured costs (collective). model: its config."""
    profile = profile_of(model)
    sizes = sorted({candidate.microbatch for candidate in candidates(profile, ranks, constraints)})
    hardware, costs = measure(profile, sizes, precision, device, ranks, world)
    return search(profile, ranks, constraints, hardware, costs, precision, most), hardware


def plan_for(
    model: Any, constraints: Constraints, precision: str, ranks: int, device: str, most: int = 10
) -> tuple[SearchResult, Hardware]:
    """The best candidates on a described device, given by its name or its TOML file."""
    profile, hardware = profile_of(model), load(device)
    if precision not in hardware.flops:
        raise UserError(
            f"--precision {precision}: {device} does not say its FLOP/s; it has {', '.join(hardware.flops)}"
        )
    costs = estimate(profile, hardware, precision)
    return search(profile, ranks, constraints, hardware, costs, precision, most), hardware


def fewest_recomputed(model: Any, candidate: Candidate, precision: str, device: torch.device, local_ranks: int) -> int:
    """The fewest blocks of every stage that must be recomputed for a candidate to fit into this machine's memory."""
    profile, memory = profile_of(model), memory_of(device, local_ranks)
    here = Hardware("this machine", memory, math.inf, {precision: math.inf}, 0.0, local_ranks, {}, {})
    predictor = Predictor(profile, here, estimate(profile, here, precision, device.type), precision)
    if max(predictor.memory(candidate)) > memory:
        candidate = predictor.sparing(candidate)
    if (needed := max(predictor.memory(candidate))) > memory:
        raise UserError(
            f"--recompute auto: with all blocks recomputed a rank needs {needed / 1e9:.1f} GB and has "
            f"{memory / 1e9:.1f}; take more ranks, a larger --pp or a smaller --micro-batch-size"
        )
    return candidate.recompute
