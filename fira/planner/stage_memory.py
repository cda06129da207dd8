"""The memory of a stage in its passes for one micro-batch, from that of its layers.

    F   layer 0 ─ layer 1 ─ layer 2      each adds what it saves, and its output
    B   layer 0 ─ layer 1 ─ layer 2      from the last to the first: each frees what it has saved, and leaves gradients
    I                                    each adds what it saves for W
    W                                    each frees this, and leaves gradients

The peak of a pass is the largest sum of a layer's peak and of what the layers before it have left. A recomputed layer
saves its input only, and has its full backward in I. With --shard parameters each layer has its weights and then its
gradients for the time of its pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fira.parallel.gradient_sum import BUCKET
from fira.planner.candidate_costs import CandidateCosts
from pipeline.schedule import ActionKind

FORWARD, BACKWARD = ActionKind.FORWARD, ActionKind.BACKWARD
INPUT, WEIGHT = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a stage for one micro-batch.

    saved: from the forward to the end of the backward, with the outputs of all layers. saved_for_weight_grad: between
    the two halves of a split backward. gradients: those that remain. peaks: of each kind of action, beyond what is
    allocated at its start.
    """

    saved: float
    saved_for_weight_grad: float
    gradients: float
    peaks: Mapping[ActionKind, float]


def stage_memory(costs: CandidateCosts, stage: int, kept: Mapping[int, float]) -> StageMemory:
    """The memory of one stage. kept: bytes of the gradients of each layer that remain after its backward."""
    passes = _StagePasses(costs, stage, kept)
    saved, forward = passes.forward()
    peaks = {FORWARD: forward, BACKWARD: passes.backward(BACKWARD), INPUT: 0.0, WEIGHT: 0.0}
    if stage == 0:  # tokens have no gradient, so the full backward is in the second half
        peaks[WEIGHT] = peaks[BACKWARD]
    else:
        peaks |= {INPUT: passes.backward(INPUT), WEIGHT: passes.backward(WEIGHT)}
    return StageMemory(saved, passes.saved_for_weight_grad() if stage else 0.0, sum(kept.values()), peaks)


class _StagePasses:
    """Follows the layers of a stage in its passes."""

    def __init__(self, costs: CandidateCosts, stage: int, kept: Mapping[int, float]) -> None:
        self._costs, self._kept = costs, kept
        self._layers = costs.stages[stage]
        self._recomputed = set(costs.recomputed(stage))

    def forward(self) -> tuple[float, float]:
        """The bytes that remain, and the peak."""
        now = peak = 0.0
        for i in self._layers:
            memory = self._costs.layer_costs[i].memory
            peak = max(peak, now + self._gathered(i) + memory.forward)
            now += self._output(i) + (0 if i in self._recomputed else memory.saved)
        return now, peak

    def backward(self, kind: ActionKind) -> float:
        """The peak of a full backward or of one of its halves. A recomputed layer has all of it in the first half."""
        now = peak = 0.0
        for i in reversed(self._layers):
            memory, is_recomputed = self._costs.layer_costs[i].memory, i in self._recomputed
            if is_recomputed and kind is WEIGHT:
                continue
            own = {BACKWARD: memory.backward, INPUT: memory.backward_input, WEIGHT: memory.backward_weight}[kind]
            if is_recomputed:
                own = max(memory.forward, memory.saved + memory.backward)
            if i == self._layers[-1] and kind is not WEIGHT:
                own -= self._output(i)  # its gradient has been received
            peak = max(peak, now + self._gathered(i) + own)
            if kind is BACKWARD and not is_recomputed:
                now -= memory.saved
            if kind is INPUT and not is_recomputed:
                now += memory.saved_for_weight_grad
                continue
            if kind is WEIGHT:
                now -= memory.saved_for_weight_grad
            peak = max(peak, now + self._sent(i))
            now += self._kept[i] - (self._output(i - 1) if kind is BACKWARD and i > self._layers[0] else 0)
        return peak

    def saved_for_weight_grad(self) -> float:
        """The bytes that remain after the first half of a backward, with the gradients of recomputed layers."""
        return sum(
            self._kept[i] if i in self._recomputed else self._costs.layer_costs[i].memory.saved_for_weight_grad
            for i in self._layers
        )

    def _output(self, layer: int) -> int:
        """Bytes of a layer's output; that of the head is a loss."""
        return self._costs.boundary if layer < len(self._costs.layer_kinds) - 1 else 0

    def _gathered(self, layer: int) -> float:
        """Bytes of the weights of other owners, and of their copies for autocast, with --shard parameters."""
        if self._costs.candidate.shard != "parameters":
            return 0.0
        kind, ep = self._costs.layer_kinds[layer], self._costs.layout.ep
        weights = kind.parameters + kind.frozen[0] + (kind.expert_parameters + kind.frozen[1]) / ep
        copies = self._costs.copy_size * (kind.cast[0] + kind.cast[1] / ep)
        return self._costs.element_size * weights * (1 - 1 / self._costs.layout.dp) + copies

    def _sent(self, layer: int) -> float:
        """Bytes of the gradients of a layer while they are sent to their owners, with --shard parameters.

        See `fira/parallel/sharded_gradient_sum.py`: those of experts have a copy in the order of the owners.
        """
        if self._costs.candidate.shard != "parameters":
            return 0.0
        kind = self._costs.layer_kinds[layer]
        dense, experts = (self._costs.element_size * size for size in (kind.parameters, kind.expert_parameters))
        return max(2 * dense + experts + min(2 * BUCKET, dense), 2 * experts + min(2 * BUCKET, experts))
