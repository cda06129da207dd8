"""The part of the gradient reduction that is visible after a rank's last action.

With NCCL, the gradients of a layer are reduced as soon as the layer's last backward is done, one layer after another
(fira/parallel/overlapped_reduction.py). The last backward of a stage with three layers:

    compute   │ layer 2 │ layer 1 │ layer 0 │
    link                │ reduce 2   │ reduce 1   │ reduce 0   │
                                            │ ◄─── visible ──► │

The gradient of a tied embedding is reduced at the end, when the two gradients of the table have been summed. Not
included: what the kernels of the reduction take from the computation that runs at the same time.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from fira.planner.candidate_costs import CandidateCosts
from pipeline.schedule import Action, ActionKind


def visible_reduction(
    costs: CandidateCosts, rank: int, spans: Sequence[tuple[Action, float, float]] | None = None
) -> float:
    """Seconds from a rank's last action to the end of its reductions.

    spans: the rank's actions with start and end, from `simulate`. Without them the result is a lower bound for every
    schedule, which counts only the stage that ends last; it is exact on a rank with one stage.
    """
    if not costs.hardware.overlaps_collectives or costs.candidate.shard == "parameters":
        return costs.reduction(rank)
    if spans is None:
        return min(_reduction_end(costs, {stage: 0.0}) for stage in costs.rank_stages[rank])
    end_of_rank = spans[-1][2]
    return _reduction_end(costs, {action.stage: end - end_of_rank for action, _, end in spans})


def _reduction_end(costs: CandidateCosts, stage_ends: Mapping[int, float]) -> float:
    """When a rank's last reduction ends, in seconds after its last action.

    stage_ends: for each of the rank's stages when its last backward ends, relative to the end of the last action.
    """
    kind = ActionKind.BACKWARD_WEIGHT if costs.splits_backward else ActionKind.BACKWARD
    end = -math.inf
    for stage, stage_end in sorted(stage_ends.items(), key=lambda item: item[1]):
        layers = costs.stages[stage]
        remaining = accumulate((costs.layer_actions[i][kind] for i in layers[:-1]), initial=0.0)  # below each layer
        for i, seconds in reversed(list(zip(layers, remaining, strict=True))):
            end = max(end, stage_end - seconds) + costs.layer_reduction(i)
    return max(end, 0.0) + (costs.tied_reduction if 0 in stage_ends else 0.0)
