"""The memory of a candidate.

memory of a rank = weights + AdamW's two moments of the trained ones, or its share of them with --shard optimizer
                 + gradients: one of each trained weight, or the partial sums of a tree (pipeline/tree_sum.py)
                 + max(activations at the schedule's peak + temporary tensors of a backward
                       + copies of matrices in the dtype of autocast (fira/parallel/cast_weights.py), reduction bucket)
"""

from bisect import bisect_left

from fira.parallel.gradient_sum import BUCKET
from fira.planner.candidate_costs import CandidateCosts
from fira.planner.candidates import schedule_of
from pipeline.simulate import peak_memory

MOMENTS = 2  # of AdamW for each trained weight


def rank_memory(costs: CandidateCosts) -> tuple[float, ...]:
    """Bytes on each rank of the pipeline."""
    activations = _peak_activations(costs)
    result = []
    for rank, layers in enumerate(costs.rank_layers):
        weights = costs.element_size * sum(costs.parameters(rank))
        moments = MOMENTS * costs.element_size * _updated(costs, rank)
        frozen = costs.element_size * costs.frozen_parameters(rank)
        recomputed = [i for stage in costs.rank_stages[rank] for i in costs.recomputed(stage)]
        recompute = max((costs.layer_costs[i].saved_for_backward for i in recomputed), default=0)
        largest_gradient = costs.element_size * max(costs.layer_kinds[i].largest for i in layers)
        workspace = max(costs.layer_costs[i].workspace for i in layers)
        backward = max(recompute + largest_gradient, workspace)
        gradients = costs.element_size * _gradients(costs, rank)
        reduction = min(weights, 3 * BUCKET) if costs.layout.dp > 1 else 0  # sent, received and reduced
        copies = costs.copy_size * costs.cast_parameters(rank)
        temporary = max(activations[rank] + backward + copies, reduction)
        result.append(weights + moments + frozen + gradients + temporary)
    return tuple(result)


def with_least_recompute(costs: CandidateCosts) -> CandidateCosts:
    """The candidate with the fewest recomputed blocks that fits into memory, or with all blocks if none fits."""
    limit = max(1, *(len(costs.blocks(stage)) for stage in range(len(costs.stages))))

    def fits(blocks: int) -> bool:
        return max(rank_memory(costs.with_recompute(blocks))) <= costs.hardware.memory

    return costs.with_recompute(min(limit, 1 + bisect_left(range(1, limit + 1), True, key=fits)))


def _updated(costs: CandidateCosts, rank: int) -> float:
    """The largest number of parameters that one of the replicas of a rank updates."""
    replicated, experts = costs.parameters(rank)
    if not costs.candidate.sharded:
        return replicated + experts
    # A parameter has one owner. The largest ones are embedding and head, which is a copy if they are tied.
    copy = len(costs.layer_kinds) - 1 if costs.profile.tied else None
    kinds = [costs.layer_kinds[i] for i in costs.rank_layers[rank] if i != copy]
    largest = max((kind.largest for kind in kinds if not kind.expert_parameters), default=0)
    return max(replicated / costs.layout.dp, largest) + experts * costs.layout.ep / costs.layout.dp


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
