"""The memory of a rank in the passes of a step, from what each action of its schedule allocates and frees.

    action   allocates                                              frees
    any      received tensors of this action and the next ones
    F        saved tensors and output
    B        gradients of the weights, gradient of the input        saved tensors, input, output and its gradient
    I        tensors saved for W, gradient of the input             gradient of the output
    W        gradients of the weights                               saved tensors, input, output

The gradients of a micro-batch are added to a tree of sums (pipeline/tree_sum.py), of which a rank has only its share
with --shard parameters.
"""

from collections.abc import Mapping
from functools import cache

from fira.planner.candidate_costs import CandidateCosts
from fira.planner.candidates import schedule_of
from fira.planner.stage_memory import BACKWARD, FORWARD, INPUT, WEIGHT, StageMemory, stage_memory
from pipeline.engine import LOOK_AHEAD
from pipeline.schedule import Action, Schedule
from pipeline.tree_sum import TreeSum, leaves_of

LONGEST = 2**10  # micro-batches whose sums are counted one by one
SIMULATED = 16  # micro-batches whose actions are followed; further ones repeat them


def passes_peak(costs: CandidateCosts, rank: int, owned: float) -> float:
    """The largest number of bytes that a rank allocates in the passes of a step.

    owned: its share of the gradients, with --shard parameters.
    """
    kept, overlapped = _gradients(costs, rank, owned)
    stages = {s: stage_memory(costs, s, {i: kept[i] for i in costs.stages[s]}) for s in costs.rank_stages[rank]}
    count, held = costs.candidate.count, sum(memory.saved + costs.boundary for memory in stages.values())
    if not costs.is_simulated:  # an upper bound
        most = max(stored_sums(count, costs.layout.dp)) * sum(memory.gradients for memory in stages.values())
        peak = max(peak for memory in stages.values() for peak in memory.peaks.values())
        return overlapped + most + min(costs.layout.pp, count) * held + peak
    simulated = min(count, max(SIMULATED, 4 * len(costs.placement)))
    schedule = schedule_of(costs.candidate.schedule, costs.layout.pp, simulated)
    account = _RankAccount(costs, rank, schedule, stages)
    account.run()
    # A rank that holds all simulated micro-batches at once, as under GPipe, holds all micro-batches of the step.
    others = count - simulated if account.most_in_flight == simulated * len(stages) else 0
    return overlapped + account.peak + others * held


def _gradients(costs: CandidateCosts, rank: int, owned: float) -> tuple[dict[int, float], float]:
    """[layer] bytes of gradients that the backward of a micro-batch leaves, and bytes of those that the step has.

    Where the reduction overlaps with the last backward, gradients are added to those of earlier micro-batches.
    """
    gradients = {i: layer_gradients(costs, i) for i in costs.rank_layers[rank]}
    if costs.candidate.shard == "parameters":
        if costs.profile.tied and len(costs.layer_kinds) - 1 in costs.rank_layers[rank]:
            owned += costs.element_size * costs.layer_kinds[0].largest  # the head's gradient of a tied embedding
        share = owned / max(1.0, sum(gradients.values()))
        return {i: share * size for i, size in gradients.items()}, 0.0
    if costs.hardware.overlaps_collectives:
        return dict.fromkeys(gradients, 0.0), costs.element_size * sum(costs.parameters(rank))
    return gradients, 0.0


def layer_gradients(costs: CandidateCosts, layer: int) -> float:
    """Bytes of the gradients of a layer. An expert has them for each rank of the ep group."""
    kind = costs.layer_kinds[layer]
    return costs.element_size * float(kind.parameters + kind.expert_parameters)


class _RankAccount:
    """The bytes that are allocated on a rank while it executes its actions."""

    def __init__(self, costs: CandidateCosts, rank: int, schedule: Schedule, stages: Mapping[int, StageMemory]) -> None:
        self._costs, self._rank, self._stages = costs, rank, stages
        self._actions = schedule.actions[rank]
        sums = stored_sums(costs.candidate.count, costs.layout.dp)
        self._sums = [0, *sums][-schedule.microbatches - 1 :]  # before the first and after each simulated micro-batch
        self._posted: set[tuple[bool, int, int]] = set()
        self._in_flight = self.most_in_flight = 0
        self._sending = 0.0
        self.now = self.peak = self._sums[0] * sum(stage.gradients for stage in stages.values())

    def run(self) -> None:
        """Execute all actions."""
        for position, action in enumerate(self._actions):
            for upcoming in self._actions[position : position + LOOK_AHEAD]:
                self._receive(upcoming)
            self.peak = max(self.peak, self.now + self._stages[action.stage].peaks[action.kind])
            self._execute(action)
            self.peak = max(self.peak, self.now)

    def _receive(self, action: Action) -> None:
        """Allocate the tensor that an action takes, if it comes from another rank and is not allocated yet."""
        message = action.kind is FORWARD, action.stage, action.microbatch
        if message not in self._posted and self._source(action) not in (None, self._rank):
            self._posted.add(message)
            self.now += self._costs.boundary

    def _source(self, action: Action) -> int | None:
        """The rank that sends what an action takes; None at the ends of the pipeline."""
        sender = action.stage + (-1 if action.kind is FORWARD else 1)
        return self._costs.placement[sender] if 0 <= sender < len(self._costs.placement) else None

    def _execute(self, action: Action) -> None:
        kind, stage, microbatch = action
        memory = self._stages[stage]
        if kind is FORWARD:
            self.now += memory.saved
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            return
        if kind is INPUT:
            self.now += memory.saved_for_weight_grad
        else:
            self._in_flight -= 1
            self.now -= memory.saved + (memory.saved_for_weight_grad if kind is WEIGHT else 0)
            self.now += memory.gradients * (self._sums[microbatch + 1] - self._sums[microbatch])
            if self._source(Action(FORWARD, stage, microbatch)) not in (None, self._rank):
                self.now -= self._costs.boundary  # the input
        # The first stage computes its gradients in the second half, until which that of its output is kept.
        is_used = kind is BACKWARD or (kind is WEIGHT) == (stage == 0)
        if is_used and self._source(Action(kind, stage, microbatch)) is not None:
            self.now -= self._costs.boundary  # the gradient of the output
        if kind is not WEIGHT and stage > 0:
            self._send_gradient(stage)

    def _send_gradient(self, stage: int) -> None:
        """Allocate the gradient of a stage's input. One that is sent is freed when the next one is sent."""
        self.now += self._costs.boundary
        if self._costs.placement[stage - 1] != self._rank:
            self.now -= self._sending
            self._sending = self._costs.boundary


@cache
def stored_sums(count: int, replicas: int) -> list[int]:
    """[micro-batch] the number of sums that a replica stores of its micro-batches when it has added this one.

    Of more than LONGEST micro-batches these are the last ones, approximately.
    """
    if count > LONGEST:
        return [(i + 1).bit_count() for i in range(count - LONGEST, count - 1)] + [1]
    tree, result = TreeSum(count * replicas), []
    for leaf in leaves_of(0, replicas, count * replicas):
        tree.add(range(leaf, leaf + 1), [])
        result.append(len(tree.sums))
    return result
