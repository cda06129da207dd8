"""The best candidates to train a model on so many ranks.

Candidates are evaluated in the order of a lower bound of their step time. The search ends when the bound exceeds the
step time of the best candidates found, so its result equals that of an exhaustive search. A candidate that does not fit
into memory is evaluated once more with the fewest recomputed blocks that make it fit.
"""

import heapq
import math
from dataclasses import dataclass

from fira.errors import UserError
from fira.planner.candidates import Constraints, candidates
from fira.planner.costs import Costs
from fira.planner.device_specs import Hardware
from fira.planner.model_profile import ModelProfile
from fira.planner.step_time import Estimate, Predictor


@dataclass(frozen=True)
class SearchResult:
    """The best candidates, the fastest first; how many there are, and how many would be faster but do not fit."""

    best: list[Estimate]
    candidates: int
    too_large: int


def search(
    profile: ModelProfile,
    ranks: int,
    constraints: Constraints,
    hardware: Hardware,
    costs: Costs,
    precision: str,
    most: int = 10,
) -> SearchResult:
    """The `most` fastest candidates that fit into memory. UserError where none is legal, or none fits."""
    predictor = Predictor(profile, hardware, costs, precision)
    every = list(candidates(profile, ranks, constraints))
    if not every:
        raise UserError(
            f"no layout of {ranks} ranks for {len(profile.layers)} layers, {profile.num_experts} experts and "
            f"{constraints.batch} sequences a batch keeps what is given; leave out a flag, or give a larger "
            "--batch-size"
        )
    queue = [(predictor.least_seconds(candidate), number) for number, candidate in enumerate(every)]
    heapq.heapify(queue)
    count = len(every)
    found: list[Estimate] = []
    smallest, too_large = math.inf, 0
    while queue:
        least, number = heapq.heappop(queue)
        if len(found) >= most and least >= found[-1].seconds:
            break
        candidate = every[number]
        memory = predictor.memory(candidate)
        if max(memory) > hardware.memory and constraints.recompute is None and not candidate.recompute:
            every.append(predictor.sparing(candidate))
            heapq.heappush(queue, (predictor.least_seconds(every[-1]), len(every) - 1))
            continue
        smallest = min(smallest, max(memory))
        if max(memory) > hardware.memory:
            too_large += not found
            continue
        found = sorted([*found, predictor.predict(candidate, memory)], key=_order)[:most]
    if not found:
        raise UserError(
            f"the model does not fit: the smallest of {count} candidates needs {smallest / 1e9:.1f} GB on a rank, "
            f"{hardware.name} has {hardware.memory / 1e9:.1f}; take more --ranks or a smaller model"
        )
    return SearchResult(found, count, too_large)


def _order(estimate: Estimate) -> tuple[float, float]:
    """The fastest first; of those as fast, to a millionth, the one that needs the least memory."""
    return float(f"{estimate.seconds:.6g}"), max(estimate.memory)
