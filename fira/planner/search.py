"""Find the fastest candidates that fit into memory.

Candidates are evaluated in ascending order of a lower bound of their step time. The search ends when the next bound is
no less than the step times of the best candidates found; its result equals that of an exhaustive search. A candidate
that does not fit into memory is replaced by the same candidate with an optimizer that is divided over the replicas,
then with divided parameters, and if this is not enough, with the fewest recomputed blocks that make it fit.
"""

import heapq
import math
from dataclasses import dataclass

from fira.errors import UserError
from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Constraints, candidates
from fira.planner.memory import rank_memory, with_least_recompute
from fira.planner.step_time import Estimate, least_seconds, predict


@dataclass(frozen=True)
class SearchResult:
    """The best candidates, fastest first; how many were considered; how many would be faster but do not fit."""

    best: list[Estimate]
    candidates: int
    too_large: int


def search(inputs: PlanInputs, ranks: int, constraints: Constraints, limit: int = 10) -> SearchResult:
    """The `limit` fastest candidates that fit into memory. Raises UserError if none is valid or none fits."""
    profile, hardware = inputs.profile, inputs.hardware
    considered = [CandidateCosts(inputs, candidate) for candidate in candidates(profile, ranks, constraints)]
    if not considered:
        raise UserError(
            f"no layout of {ranks} ranks for {len(profile.layers)} layers, {profile.num_experts} experts and "
            f"{constraints.batch} sequences per batch satisfies all flags; omit one, or give a larger --batch-size"
        )
    queue = [(least_seconds(costs), number) for number, costs in enumerate(considered)]
    heapq.heapify(queue)
    count = len(considered)
    best: list[Estimate] = []
    smallest, too_large = math.inf, 0
    while queue:
        bound, number = heapq.heappop(queue)
        if len(best) >= limit and bound >= best[-1].seconds:
            break
        costs = considered[number]
        memory = max(rank_memory(costs))
        shard = {None: "optimizer", "optimizer": "parameters"}.get(costs.candidate.shard)
        if memory > hardware.memory and costs.layout.dp > 1 and constraints.shard is None and shard:
            considered.append(costs.with_sharding(shard))
            heapq.heappush(queue, (least_seconds(considered[-1]), len(considered) - 1))
            continue
        if memory > hardware.memory and constraints.recompute is None and not costs.candidate.recompute:
            considered.append(with_least_recompute(costs))
            heapq.heappush(queue, (least_seconds(considered[-1]), len(considered) - 1))
            continue
        smallest = min(smallest, memory)
        if memory > hardware.memory:
            too_large += not best
            continue
        best = sorted([*best, predict(costs)], key=_order)[:limit]
    if not best:
        raise UserError(
            f"the model does not fit: the smallest of {count} candidates needs {smallest / 1e9:.1f} GB on a rank, "
            f"{hardware.name} has {hardware.memory / 1e9:.1f}; use more ranks or a smaller model"
        )
    return SearchResult(best, count, too_large)


def _order(estimate: Estimate) -> tuple[float, float]:
    """By step time, rounded to six digits, then by memory."""
    return float(f"{estimate.seconds:.6g}"), max(estimate.memory)
