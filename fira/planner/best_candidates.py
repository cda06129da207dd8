"""Find the best candidates for a model on this machine or on a described device, and the least recomputation."""

import math

import torch

from fira.errors import UserError
from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate, Constraints, candidates
from fira.planner.costs import LayerCost, roofline_costs
from fira.planner.device_specs import OPERATIONS, Hardware, Link
from fira.planner.measure import device_memory, least_memory, measure
from fira.planner.memory import rank_memory, with_least_recompute
from fira.planner.model_profile import ModelProfile
from fira.planner.search import SearchResult, search
from pipeline.mpi import World


def plan_here(
    profile: ModelProfile,
    constraints: Constraints,
    precision: str,
    ranks: int,
    device: torch.device,
    world: World,
    limit: int = 10,
) -> tuple[SearchResult, Hardware]:
    """Find the best candidates on this machine by measured costs (collective).

    Raises UserError if no candidate satisfies the constraints or none fits, before anything is measured if none fits
    even without activations.
    """
    local_ranks = world.local_size if world.size == ranks else ranks
    here = memory_only(least_memory(device, local_ranks), precision, local_ranks, device.type)
    # To estimate activations without a measurement would import torch's compiler, which takes seconds.
    free = [LayerCost(0.0, 0.0, 0.0, 0.0, 0.0)] * len(profile.kinds)
    search(PlanInputs(profile, here, lambda _: free, precision), ranks, constraints, limit=1)
    sizes = sorted({candidate.microbatch for candidate in candidates(profile, ranks, constraints)})
    hardware, cost_model = measure(profile, sizes, precision, device, ranks, world)
    return search(PlanInputs(profile, hardware, cost_model, precision), ranks, constraints, limit), hardware


def plan_for(
    profile: ModelProfile, constraints: Constraints, precision: str, ranks: int, hardware: Hardware, limit: int = 10
) -> SearchResult:
    """Find the best candidates on a described device.

    Raises UserError if the description has no FLOP/s for the precision.
    """
    if precision not in hardware.flops:
        raise UserError(
            f"--precision {precision}: {hardware.name} has no FLOP/s for it; choose one of {', '.join(hardware.flops)}"
        )
    cost_model = roofline_costs(profile, hardware, precision)
    return search(PlanInputs(profile, hardware, cost_model, precision), ranks, constraints, limit)


def memory_only(memory: float, precision: str, local_ranks: int, device: str) -> Hardware:
    """A description of this machine for estimates of memory, in which nothing takes time. device: torch's type."""
    flops, links = {precision: math.inf}, dict.fromkeys(OPERATIONS, Link(0.0, math.inf))
    return Hardware(
        "this machine", memory, math.inf, flops, 0.0, local_ranks, links, links, overlaps_collectives=device != "cpu"
    )


def least_recompute(
    profile: ModelProfile, candidate: Candidate, precision: str, device: torch.device, local_ranks: int
) -> int:
    """The fewest blocks of every stage that must be recomputed for a candidate to fit into this machine's memory.

    Raises UserError if the candidate does not fit even with all blocks recomputed.
    """
    memory = device_memory(device, local_ranks)
    here = memory_only(memory, precision, local_ranks, device.type)
    cost_model = roofline_costs(profile, here, precision, device.type)
    costs = CandidateCosts(PlanInputs(profile, here, cost_model, precision), candidate)
    if max(rank_memory(costs)) > memory:
        costs = with_least_recompute(costs)
    if (needed := max(rank_memory(costs))) > memory:
        raise UserError(
            f"--recompute auto: with all blocks recomputed a rank needs {needed / 1e9:.1f} GB and has "
            f"{memory / 1e9:.1f}; use more ranks, a larger --pp or a smaller --micro-batch-size"
        )
    return costs.candidate.recompute
