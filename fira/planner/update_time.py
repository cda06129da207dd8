"""The time of the update, after the gradients are reduced.

update = AdamW, whose time is also that of Muon's operations on single elements
       + with Muon: orthogonalisation of the matrices, each of which is computed by one of its replicas
                    + all-gather of the results, unless the replicas own the updates (--shard)
"""

from fira.optim.newton_schulz import flops
from fira.planner.candidate_costs import CandidateCosts, all_reduce_seconds


def update_seconds(costs: CandidateCosts) -> float:
    """Seconds of the slowest rank's update and of one small all-reduce over all ranks (loss, norm, loads)."""
    world = costs.layout.world
    slowest = max(_elementwise(costs, rank) + _orthogonalization(costs, rank) for rank in range(costs.layout.pp))
    return slowest + all_reduce_seconds(costs.hardware.links(world, 1), world, 0.0)


def _elementwise(costs: CandidateCosts, rank: int) -> float:
    seconds = 0.0
    for i in costs.rank_layers[rank]:
        kind = costs.layer_kinds[i]
        parameters = max(1, kind.parameters + kind.expert_parameters)
        share = (kind.parameters + kind.expert_parameters / costs.layout.ep) / parameters
        seconds += share * costs.layer_costs[i].optimizer
    return seconds


def _orthogonalization(costs: CandidateCosts, rank: int) -> float:
    """Seconds until all replicas of a rank have the results."""
    layers = [i for i in costs.rank_layers[rank] if costs.layer_kinds[i].hidden]
    divided = sum(costs.layer_costs[i].orthogonalize for i in layers) / costs.layout.dp
    # A GPU computes the matrices of all experts at once, so that the slowest replica has one of these stacks.
    whole = max((_largest(costs, i) for i in layers), default=0.0) if costs.hardware.overlaps_collectives else 0.0
    return max(divided, whole) + (0.0 if costs.candidate.shard else costs.over_replicas(*costs.hidden(rank)) / 2)


def _largest(costs: CandidateCosts, layer: int) -> float:
    """Seconds for the largest matrix of a layer, or stack of the matrices of a rank's experts."""
    hidden, ep = costs.layer_kinds[layer].hidden, costs.layout.ep
    share = max(flops(p.shape) / (ep if p.expert else 1) for p in hidden) / sum(flops(p.shape) for p in hidden)
    return share * costs.layer_costs[layer].orthogonalize
