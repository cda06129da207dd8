"""What a candidate to train takes, in time and memory.

A step is the pipeline as the simulator plays it, the reduction of gradients over replicas, and the optimizer. All
replicas do alike, so one pipeline stands for all.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from fira.parallel.gradients import BUCKET, LARGE
from fira.planner.candidates import Candidate, placement_of, schedule_of, splits
from fira.planner.costs import ITEM, Costs
from fira.planner.device_specs import Hardware, Links
from fira.planner.model_profile import LayerKind, ModelProfile
from pipeline.mesh import Layout
from pipeline.partition import partition
from pipeline.schedule import ActionKind
from pipeline.simulate import Timeline, earliest_ends, peak_memory, simulate

MOST_ACTIONS = 10_000  # forwards simulated of one pipeline; further micro-batches go by at the slowest rank's pace
GREEDY = 64  # ranks from which on ZB-V's lists take long to deal; its bound stands for them
STATES = 4  # a weight, its gradient and AdamW's two moments


@dataclass(frozen=True)
class Estimate:
    """What a candidate takes. parts: seconds of a step by what they go to, mean over ranks; their sum is the step."""

    candidate: Candidate
    seconds: float
    memory: tuple[float, ...]  # bytes, by rank of the pipeline
    parts: Mapping[str, float]
    timeline: Timeline | None  # of one pipeline; None where it was not simulated

    @property
    def bubble(self) -> float:
        """Fraction of the step in which ranks wait for one another in the pipeline."""
        return (self.parts["fill"] + self.parts["uneven"]) / self.seconds

    @property
    def limit(self) -> str:
        """What most of the time goes to beside computing; "compute" where that is little."""
        most = max((name for name in self.parts if name != "compute"), key=self.parts.__getitem__)
        return most if self.parts[most] > 0.1 * self.seconds else "compute"


class Predictor:
    """Costs of layers, links and memory put together."""

    def __init__(self, profile: ModelProfile, hardware: Hardware, costs: Costs, precision: str) -> None:
        self.profile = profile
        self.hardware = hardware
        self.costs = cache(costs)
        self.item = ITEM.get(precision, 4)
        self.stages = cache(lambda count: partition(profile.flops, count))

    def predict(self, candidate: Candidate, memory: tuple[float, ...] | None = None) -> Estimate:
        """Simulate a candidate."""
        layout, placement = candidate.layout, placement_of(candidate.schedule, candidate.layout.pp)
        costs, transfer = self._actions(candidate), self._transfer(candidate)
        busy = self._busy(candidate, costs)
        timeline = None
        if candidate.schedule == "zb-v" and layout.pp >= GREEDY:
            ends = self._soonest(candidate)
        else:
            few = min(candidate.count, max(4 * len(placement), MOST_ACTIONS // len(placement)))
            timeline = simulate(schedule_of(candidate.schedule, layout.pp, few), costs, transfer)
            rest = (candidate.count - few) * max(busy)
            ends = [rest + max((end for _, _, end in spans), default=0.0) for spans in timeline.spans]
        reduction = [self._reduction(candidate, rank) for rank in range(layout.pp)]
        reduced = max(end + r for end, r in zip(ends, reduction, strict=True))
        update = max(self._optimizer(candidate, rank) for rank in range(layout.pp)) + self._sums(layout)
        length = max(ends)
        work = candidate.count * sum(busy) / layout.pp
        exchange = candidate.count * sum(self._exchanges(candidate)) / layout.pp
        uneven = min(length - work, candidate.count * (max(busy) - sum(busy) / layout.pp))
        parts = {
            "compute": work - exchange,
            "exchange": exchange,
            "fill": length - work - uneven,
            "uneven": uneven,
            "reduce": reduced - length,
            "optimizer": update,
        }
        return Estimate(candidate, reduced + update, memory or self.memory(candidate), parts, timeline)

    def least_seconds(self, candidate: Candidate) -> float:
        """No schedule with these stages can take less."""
        ends = [end + self._reduction(candidate, rank) for rank, end in enumerate(self._soonest(candidate))]
        return (
            max(ends)
            + max(self._optimizer(candidate, rank) for rank in range(candidate.layout.pp))
            + self._sums(candidate.layout)
        )

    def memory(self, candidate: Candidate) -> tuple[float, ...]:
        """Bytes on each rank of the pipeline: weights, gradients, moments; activations as the schedule holds them,
        logits among them; and what a backward or a reduction needs beside them."""
        layout, placement = candidate.layout, placement_of(candidate.schedule, candidate.layout.pp)
        costs, last = self.costs(candidate.microbatch), len(placement) - 1
        sizes, noted, single = [], [], []
        for s, span in enumerate(self.stages(len(placement))):
            layers = [costs[self.profile.layers[i]] for i in span]
            again = [costs[self.profile.layers[i]].kept for i in self._again(candidate, span)]
            kept = sum(cost.kept for cost in layers) - sum(again) + len(again) * self._boundary(candidate)
            single.append(max(again, default=0))
            halves = [costs[self.profile.layers[i]].noted for i in span if i not in self._again(candidate, span)]
            noted.append(sum(halves) if s > 0 else self._boundary(candidate))  # the first stage has no first half
            sizes.append(kept + (self._boundary(candidate) if s < last else 0))
        if candidate.schedule == "zb-v" and layout.pp >= GREEDY:
            held = tuple(
                float(min(layout.pp, candidate.count) * (sizes[r] + sizes[last - r])) for r in range(layout.pp)
            )
        else:
            few = min(candidate.count, 4 * len(placement))
            peaks = peak_memory(schedule_of(candidate.schedule, layout.pp, few), sizes, noted)
            whole = [few * sum(sizes[s] for s, r in enumerate(placement) if r == rank) for rank in range(layout.pp)]
            scale = [candidate.count / few if peak == all_ else 1.0 for peak, all_ in zip(peaks, whole, strict=True)]
            held = tuple(peak * factor for peak, factor in zip(peaks, scale, strict=True))
        result = []
        for rank in range(layout.pp):
            mine = [s for s, r in enumerate(placement) if r == rank]
            weights = self.item * sum(self._parameters(candidate, rank))
            largest = self.item * max(self._kind(i).largest for s in mine for i in self.stages(len(placement))[s])
            working = max(costs[self.profile.layers[i]].working for i in self._layers(candidate, rank))
            backward = max(max(single[s] for s in mine) + largest, working)
            reduction = min(weights, BUCKET + LARGE) if layout.dp > 1 else 0
            result.append(STATES * weights + max(held[rank] + backward, reduction))
        return tuple(result)

    def _kind(self, layer: int) -> LayerKind:
        return self.profile.kinds[self.profile.layers[layer]]

    def _layers(self, candidate: Candidate, rank: int) -> list[int]:
        placement = placement_of(candidate.schedule, candidate.layout.pp)
        spans = self.stages(len(placement))
        return [i for s, r in enumerate(placement) if r == rank for i in spans[s]]

    def _again(self, candidate: Candidate, span: range) -> list[int]:
        """The layers of a stage that are recomputed: of its blocks, the first."""
        return [i for i in span if 0 < i < len(self.profile.layers) - 1][: candidate.recompute]

    def sparing(self, candidate: Candidate) -> Candidate:
        """The candidate with as few blocks recomputed as fit into memory; with all of them where it never fits."""
        spans = self.stages(len(placement_of(candidate.schedule, candidate.layout.pp)))
        most = max(1, *(len(self._again(replace(candidate, recompute=span.stop), span)) for span in spans))

        def fits(blocks: int) -> bool:
            return max(self.memory(replace(candidate, recompute=blocks))) <= self.hardware.memory

        return replace(candidate, recompute=min(most, 1 + bisect_left(range(1, most + 1), True, key=fits)))

    def _boundary(self, candidate: Candidate) -> int:
        """Bytes of a tensor that crosses from stage to stage."""
        return candidate.microbatch * self.profile.tokens * self.profile.width * self.item

    def _transfer(self, candidate: Candidate) -> float:
        return self.hardware.links(candidate.layout.pp, candidate.layout.dp)["p2p"].seconds(self._boundary(candidate))

    def _exchange(self, candidate: Candidate, kind: int) -> tuple[float, float]:
        """Seconds that a layer's tokens travel to experts and back, in a forward and in a backward."""
        ep, k = candidate.layout.ep, self.profile.kinds[kind]
        if ep == 1 or not k.exchanges:
            return 0.0, 0.0
        link = self.hardware.links(ep, 1)["all_to_all"]
        once = link.seconds(self._boundary(candidate) * k.copies * (ep - 1) / ep)
        return k.exchanges * (link.latency + 2 * once), k.exchanges * 2 * once

    def _exchanges(self, candidate: Candidate) -> list[float]:
        """Seconds of exchange in one micro-batch's forward and backward, by rank."""
        return [
            sum(sum(self._exchange(candidate, self.profile.layers[i])) for i in self._layers(candidate, rank))
            for rank in range(candidate.layout.pp)
        ]

    def _actions(self, candidate: Candidate) -> dict[ActionKind, list[float]]:
        """What each stage takes for each kind of action."""
        costs = self.costs(candidate.microbatch)
        result: dict[ActionKind, list[float]] = {kind: [] for kind in ActionKind}
        for span in self.stages(len(placement_of(candidate.schedule, candidate.layout.pp))):
            forward = whole = back = weight = 0.0
            again = self._again(candidate, span)
            for i in span:
                cost, (there, and_back) = (
                    costs[self.profile.layers[i]],
                    self._exchange(candidate, self.profile.layers[i]),
                )
                recomputed = cost.forward + there if i in again else 0.0
                forward += cost.forward + there
                whole += cost.backward + and_back + recomputed
                back += (cost.backward if i in again else cost.input) + and_back + recomputed  # cannot be split
                weight += 0.0 if i in again else cost.weight
            if not result[ActionKind.FORWARD]:  # the first stage: tokens have no gradient, all is in the second half
                back, weight = 0.0, whole
            for kind, seconds in zip(ActionKind, (forward, whole, back, weight), strict=True):
                result[kind].append(seconds)
        return result

    def _busy(self, candidate: Candidate, costs: Mapping[ActionKind, Sequence[float]]) -> list[float]:
        """Seconds of work that a micro-batch is for each rank."""
        backward = [ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT]
        kinds = [ActionKind.FORWARD, *(backward if splits(candidate.schedule) else [ActionKind.BACKWARD])]
        busy = [0.0] * candidate.layout.pp
        for stage, rank in enumerate(placement_of(candidate.schedule, candidate.layout.pp)):
            busy[rank] += sum(costs[kind][stage] for kind in kinds)
        return busy

    def _soonest(self, candidate: Candidate) -> list[float]:
        costs = self._actions(candidate)
        if not splits(candidate.schedule):
            costs |= {
                ActionKind.BACKWARD_INPUT: costs[ActionKind.BACKWARD],
                ActionKind.BACKWARD_WEIGHT: [0.0] * len(costs[ActionKind.BACKWARD]),
            }
        placement = placement_of(candidate.schedule, candidate.layout.pp)
        return earliest_ends(placement, candidate.count, costs, self._transfer(candidate))

    def _parameters(self, candidate: Candidate, rank: int) -> tuple[float, float]:
        """How many a rank holds: whole ones, and its share of the experts'."""
        layers = self._layers(candidate, rank)
        whole = sum(self._kind(i).parameters for i in layers)
        if self.profile.tied and {0, len(self.profile.layers) - 1} <= set(layers):
            whole -= self._kind(0).largest
        return whole, sum(self._kind(i).expert_parameters for i in layers) / candidate.layout.ep

    def _reduction(self, candidate: Candidate, rank: int) -> float:
        """Sum gradients over replicas: all over dp, experts' over the ranks that hold the same."""
        layout, seconds = candidate.layout, 0.0
        groups = ((layout.dp, 1), (layout.dp // layout.ep, layout.ep))
        for parameters, (size, stride) in zip(self._parameters(candidate, rank), groups, strict=True):
            if size > 1 and parameters:
                amount = self.item * parameters
                seconds += _all_reduce(self.hardware.links(size, stride), size, amount)
        if self.profile.tied and layout.pp > 1 and rank == 0:
            table = self.item * self._kind(0).largest
            seconds += 2 * self.hardware.links(layout.pp, layout.dp)["p2p"].seconds(table)
        return seconds

    def _optimizer(self, candidate: Candidate, rank: int) -> float:
        costs, seconds = self.costs(candidate.microbatch), 0.0
        for i in self._layers(candidate, rank):
            k = self._kind(i)
            share = (k.parameters + k.expert_parameters / candidate.layout.ep) / (k.parameters + k.expert_parameters)
            seconds += share * costs[self.profile.layers[i]].optimizer
        return seconds

    def _sums(self, layout: Layout) -> float:
        """The one small sum over all ranks: loss, norms, loads."""
        return _all_reduce(self.hardware.links(layout.world, 1), layout.world, 0.0)


def _all_reduce(links: Links, size: int, amount: float) -> float:
    """A ring for large tensors, where each rank sends twice nearly all of it; a tree's latency."""
    link = links["all_reduce"]
    return 2 * math.ceil(math.log2(size)) * link.latency + 2 * (size - 1) / size * amount / link.bandwidth
