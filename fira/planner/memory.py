"""The memory of a candidate.

memory of a rank = weights + moments of the trained ones, or its share of them with --shard optimizer
                 + gradients: one of each trained weight, or the partial sums of a tree (pipeline/tree_sum.py)
                 + max(activations at the schedule's peak + temporary tensors of a backward
                       + copies of matrices in the dtype of autocast (fira/parallel/cast_weights.py),
                       reduction bucket, matrices that replicas orthogonalise for each other)

With --shard parameters, weights and gradients are also those of its share, and temporary tensors are the weights and
gradients of one layer.
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache

from fira.parallel.gradient_sum import BUCKET
from fira.planner.candidate_costs import CandidateCosts
from fira.planner.candidates import schedule_of
from fira.planner.model_profile import TrainedParameter
from pipeline.owned_tensors import balanced_owners
from pipeline.simulate import peak_memory


def rank_memory(costs: CandidateCosts) -> tuple[float, ...]:
    """Bytes on each rank of the pipeline."""
    activations = _peak_activations(costs)
    result = []
    for rank, layers in enumerate(costs.rank_layers):
        if costs.candidate.shard == "parameters":
            result.append(_divided_memory(costs, rank, activations[rank]))
            continue
        weights = costs.element_size * sum(costs.parameters(rank))
        moments = costs.element_size * _owned(costs, rank, lambda p: p.moments)
        frozen = costs.element_size * costs.frozen_parameters(rank)
        recomputed = [i for stage in costs.rank_stages[rank] for i in costs.recomputed(stage)]
        recompute = max((costs.layer_costs[i].saved_for_backward for i in recomputed), default=0)
        largest_gradient = costs.element_size * max(costs.layer_kinds[i].largest for i in layers)
        workspace = max(costs.layer_costs[i].workspace for i in layers)
        backward = max(recompute + largest_gradient, workspace)
        gradients = costs.element_size * _gradients(costs, rank)
        reduction = min(weights, 3 * BUCKET) if costs.layout.dp > 1 else 0  # sent, received and reduced
        copies = costs.copy_size * costs.cast_parameters(rank)
        temporary = max(activations[rank] + backward + copies, reduction, _orthogonalized(costs, rank))
        result.append(weights + moments + frozen + gradients + temporary)
    return tuple(result)


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


def _orthogonalized(costs: CandidateCosts, rank: int) -> float:
    """Bytes of the results of Muon that the replicas of a rank share, see `pipeline/divided_work.py`."""
    if costs.candidate.shard:
        return 0.0
    groups = zip(costs.hidden(rank), (costs.layout.dp, costs.layout.dp // costs.layout.ep), strict=True)
    return costs.element_size * max(size if replicas > 1 else 0.0 for size, replicas in groups)


def _divided_memory(costs: CandidateCosts, rank: int, activations: float) -> float:
    """Bytes on the replica of a rank with the most parameters, if the replicas divide them.

    The peak is at the start of the last backward, with all activations, or at its end, with all gradients.
    """
    count, owned = costs.candidate.count, costs.element_size * _owned(costs, rank, lambda p: p.size)
    moments = costs.element_size * _owned(costs, rank, lambda p: p.moments)
    if costs.profile.tied and rank == costs.placement[-1] != costs.placement[0]:
        owned += costs.element_size * costs.layer_kinds[0].largest  # the copy of the embedding
    frozen = costs.element_size * sum(sum(costs.layer_kinds[i].frozen) for i in costs.rank_layers[rank])
    used, sent = 0.0, 0.0  # of one layer: weights and temporary tensors, gradients in two orders
    for i in costs.rank_layers[rank]:
        kind, cost = costs.layer_kinds[i], costs.layer_costs[i]
        weights = kind.parameters + kind.frozen[0] + (kind.expert_parameters + kind.frozen[1]) / costs.layout.ep
        gathered = costs.element_size * weights * (1 - 1 / costs.layout.dp)
        # Experts have gradients for each rank of the ep group.
        gradients = costs.element_size * (kind.parameters + kind.expert_parameters)
        copies = costs.copy_size * (kind.cast[0] + kind.cast[1] / costs.layout.ep)
        is_recomputed = any(i in costs.recomputed(stage) for stage in costs.rank_stages[rank])
        recompute = cost.saved_for_backward if is_recomputed else 0
        used = max(used, gathered + copies + max(recompute + gradients, cost.workspace))
        sent = max(sent, 2 * gradients)
    start, end = count.bit_length() - 1, (count + 1).bit_length() - 1  # most complete nodes of the tree
    held = owned + moments + frozen / costs.layout.dp
    return held + max(start * owned + activations + used, end * owned + sent)


def _gradients(costs: CandidateCosts, rank: int) -> float:
    """Numbers in the gradients that a rank stores at the end of the last backward."""
    replicated, experts = costs.parameters(rank)
    if costs.hardware.overlaps_collectives:
        return replicated + experts
    # n micro-batches leave the sums of about log₂ n nodes, and experts have them for every rank of the ep group.
    return costs.candidate.count.bit_length() * (replicated + costs.layout.ep * experts)


def _peak_activations(costs: CandidateCosts) -> list[float]:
    """[rank] bytes saved for backward passes, at the peak of the schedule."""
    count, last = costs.candidate.count, len(costs.stages) - 1
    saved, saved_for_weight_grad = zip(*(_saved(costs, stage) for stage in range(last + 1)), strict=True)
    if not costs.is_simulated:
        return [float(min(costs.layout.pp, count) * (saved[r] + saved[last - r])) for r in range(costs.layout.pp)]
    simulated = min(count, 4 * len(costs.placement))
    schedule = schedule_of(costs.candidate.schedule, costs.layout.pp, simulated)
    result = []
    for rank, peak in enumerate(peak_memory(schedule, saved, saved_for_weight_grad)):
        # A rank that holds all simulated micro-batches at once, as under GPipe, holds all micro-batches of the step.
        holds_all = peak == simulated * sum(saved[stage] for stage in costs.rank_stages[rank])
        result.append(peak * (count / simulated if holds_all else 1.0))
    return result


def _saved(costs: CandidateCosts, stage: int) -> tuple[int, int]:
    """Bytes that a stage saves of a micro-batch: from forward to backward, and between halves of a split backward."""
    recomputed = costs.recomputed(stage)
    regular = [i for i in costs.stages[stage] if i not in recomputed]
    saved = sum(costs.layer_costs[i].saved_for_backward for i in regular) + len(recomputed) * costs.boundary
    output = costs.boundary if stage < len(costs.stages) - 1 else 0
    if stage == 0:  # the full backward is in the second half, until which the gradient of the output is kept
        return saved + output, costs.boundary
    return saved + output, sum(costs.layer_costs[i].saved_for_weight_grad for i in regular)
