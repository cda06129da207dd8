"""The memory of a candidate.

memory of a rank = weights + moments of the trained ones, or its share of them with --shard
                 + max(passes and copies of matrices in the dtype of autocast,    fira/planner/step_memory.py
                       reduction of the gradients,                                fira/planner/update_memory.py
                       update)
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache

from fira.planner.candidate_costs import CandidateCosts
from fira.planner.model_profile import TrainedParameter
from fira.planner.step_memory import passes_peak
from fira.planner.update_memory import reduction_peak, update_peak
from pipeline.owned_tensors import balanced_owners


def rank_memory(costs: CandidateCosts) -> tuple[float, ...]:
    """Bytes on each rank of the pipeline."""
    return tuple(_memory(costs, rank) for rank in range(costs.layout.pp))


def _memory(costs: CandidateCosts, rank: int) -> float:
    """Bytes on the replica of a rank with the most."""
    size, divided = costs.element_size, costs.candidate.shard == "parameters"
    moments, owned = (size * _owned(costs, rank, amount) for amount in (lambda p: p.moments, lambda p: p.size))
    weights, frozen = size * sum(costs.parameters(rank)), size * costs.frozen_parameters(rank)
    copies = costs.copy_size * costs.cast_parameters(rank)
    if divided:
        weights, frozen, copies = owned, frozen / costs.layout.dp, 0.0
        if costs.profile.tied and rank == costs.placement[-1] != costs.placement[0]:
            weights += size * costs.layer_kinds[0].largest  # the copy of the embedding
    peaks = (
        copies + passes_peak(costs, rank, owned),
        reduction_peak(costs, rank),
        update_peak(costs, rank, owned),
    )
    return weights + moments + frozen + max(peaks)


def with_least_recompute(costs: CandidateCosts) -> CandidateCosts:
    """The candidate with the fewest recomputed blocks that fits into memory, or with all blocks if none fits."""
    limit = max(1, *(len(costs.blocks(stage)) for stage in range(len(costs.stages))))

    def fits(blocks: int) -> bool:
        return max(rank_memory(costs.with_recompute(blocks))) <= costs.hardware.memory

    return costs.with_recompute(min(limit, 1 + bisect_left(range(1, limit + 1), True, key=fits)))


def _owned(costs: CandidateCosts, rank: int, amount: Callable[[TrainedParameter], int]) -> float:
    """The largest amount, summed over parameters, that one of the replicas of a rank updates."""
    updated, ep = costs.updated(rank), costs.layout.ep
    if not costs.candidate.shard:
        return sum(amount(p) / (ep if p.expert else 1) for p in updated)

    def by_replica(expert: bool, replicas: int) -> list[int]:
        parameters = [p for p in updated if p.expert == expert]
        return _by_owner(tuple(p.size for p in parameters), tuple(map(amount, parameters)), replicas)

    dense, of_experts = by_replica(False, costs.layout.dp), by_replica(True, costs.layout.dp // ep)
    return max(own + of_experts[replica // ep] / ep for replica, own in enumerate(dense))


@cache
def _by_owner(sizes: tuple[int, ...], amounts: tuple[int, ...], ranks: int) -> list[int]:
    """[rank] sum of the amounts of the tensors that it owns, see `fira/parallel/param_shard.py`."""
    owned = [0] * ranks
    for amount, owner in zip(amounts, balanced_owners(sizes, ranks), strict=True):
        owned[owner] += amount
    return owned
