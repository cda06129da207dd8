"""The costs of one candidate, from which `memory.py` and `step_time.py` compute its estimate.

    profile, hardware, cost model, candidate
        → placement   [stage]  rank that holds the stage
        → stages      [stage]  range of layers
        → rank_layers [rank]   layers
        → layer_costs [layer]  LayerCost for one micro-batch
        → actions     [kind of action][stage]  seconds

All replicas take the same time, so only one pipeline is considered, and "rank" is a rank within this pipeline.
"""

import math
from dataclasses import replace
from functools import cache, cached_property
from typing import Self

import torch

from fira.planner.candidates import Candidate
from fira.planner.costs import CostModel, copy_size, element_size
from fira.planner.device_specs import Hardware, Links
from fira.planner.model_profile import LayerKind, ModelProfile, TrainedParameter
from pipeline.partition import partition
from pipeline.schedule import SCHEDULES, ActionKind

MAX_ZB_V_RANKS = 64  # from this number of ranks on, ZB-V is not simulated, because building its lists takes too long


class PlanInputs:
    """Inputs common to all candidates: model, hardware, and the costs of layers, cached by micro-batch size."""

    def __init__(self, profile: ModelProfile, hardware: Hardware, cost_model: CostModel, precision: str) -> None:
        self.profile = profile
        self.hardware = hardware
        self.cost_model = cache(cost_model)
        self.element_size = element_size(precision)
        self.copy_size = copy_size(precision)
        self.stages = cache(lambda count: partition(profile.flops, count))


class CandidateCosts:
    """Stages, layers and durations of one candidate."""

    def __init__(self, inputs: PlanInputs, candidate: Candidate) -> None:
        self.inputs = inputs
        self.candidate = candidate
        self.layout = candidate.layout
        self.profile, self.hardware = inputs.profile, inputs.hardware
        self.element_size, self.copy_size = inputs.element_size, inputs.copy_size
        spec = SCHEDULES[candidate.schedule]
        self.placement = spec.placement(self.layout.pp)
        self.splits_backward = spec.splits_backward
        self.is_simulated = candidate.schedule != "zb-v" or self.layout.pp < MAX_ZB_V_RANKS
        self.stages = inputs.stages(len(self.placement))
        self.rank_stages = [[s for s, r in enumerate(self.placement) if r == rank] for rank in range(self.layout.pp)]
        self.rank_layers = [[i for s in stages for i in self.stages[s]] for stages in self.rank_stages]
        by_kind = inputs.cost_model(candidate.microbatch)
        self.layer_costs = [by_kind[kind] for kind in self.profile.layers]
        self.layer_kinds = [self.profile.kinds[kind] for kind in self.profile.layers]

    def with_recompute(self, blocks: int) -> Self:
        """The same candidate with `blocks` blocks of every stage recomputed."""
        return type(self)(self.inputs, replace(self.candidate, recompute=blocks))

    def with_sharding(self, shard: str) -> Self:
        """The same candidate with "optimizer" or "parameters" divided over the replicas."""
        return type(self)(self.inputs, replace(self.candidate, shard=shard))

    def blocks(self, stage: int) -> list[int]:
        """The layers of a stage that can be recomputed: those between embedding and head."""
        return [i for i in self.stages[stage] if 0 < i < len(self.profile.layers) - 1]

    def recomputed(self, stage: int) -> list[int]:
        """The layers of a stage that are recomputed in its backward: the first of its blocks."""
        return self.blocks(stage)[: self.candidate.recompute]

    @cached_property
    def boundary(self) -> int:
        """Bytes of a tensor that is sent from one stage to the next."""
        return self.candidate.microbatch * self.profile.tokens * self.profile.width * self.element_size

    @cached_property
    def transfer(self) -> float:
        """Seconds to send a tensor from one stage to the next."""
        return self.hardware.links(self.layout.pp, self.layout.dp)["p2p"].seconds(self.boundary)

    @cached_property
    def exchange(self) -> list[tuple[float, float]]:
        """[layer] seconds that communication adds to a forward and to a backward of one micro-batch: the all-to-all of
        experts, and the exchange of divided parameters."""
        return [
            (experts[0] + parameters[0], experts[1] + parameters[1])
            for experts, parameters in zip(self._expert_exchange, self._parameter_exchange, strict=True)
        ]

    @cached_property
    def _parameter_exchange(self) -> list[tuple[float, float]]:
        """[layer] seconds that gathering divided parameters and sending their gradients to the owners takes."""
        if self.candidate.shard != "parameters":
            return [(0.0, 0.0)] * len(self.layer_kinds)
        result = []
        for kind in self.layer_kinds:
            replicated, experts = kind.parameters, kind.expert_parameters
            frozen = kind.frozen
            # An all-reduce is a reduce-scatter and an all-gather.
            reduce = self.over_replicas(replicated, experts / self.layout.ep) / 2
            gather = self.over_replicas(replicated + frozen[0], (experts + frozen[1]) / self.layout.ep) / 2
            result.append((gather, (2 if self.splits_backward else 1) * gather + reduce))
        return result

    @cached_property
    def _expert_exchange(self) -> list[tuple[float, float]]:
        """[layer] seconds of the experts' all-to-all."""
        link = self.hardware.links(self.layout.ep, 1)["all_to_all"]
        result = []
        for kind, cost, flops in zip(self.layer_kinds, self.layer_costs, self.profile.flops, strict=True):
            if self.layout.ep == 1 or not kind.moe_layers:
                result.append((0.0, 0.0))
                continue
            expert_flops = 2 * kind.top_k * (kind.expert_parameters + kind.frozen[1]) / self.profile.num_experts
            backward = cost.backward_input if self.splits_backward else cost.backward
            forward_exchange, backward_exchange = (
                self._exchange(kind, expert_flops / flops * t) for t in (cost.forward, backward)
            )
            # A forward also exchanges the counts, which are small.
            result.append((kind.moe_layers * link.latency + forward_exchange, backward_exchange))
        return result

    def _exchange(self, kind: LayerKind, products: float) -> float:
        """Seconds that sending rows to the experts and back adds to a layer. products: seconds of the experts."""
        ep = self.layout.ep
        links = self.hardware.links(ep, 1)
        size = self.boundary * kind.top_k * (ep - 1) / ep
        between_nodes = links is self.hardware.between and self.profile.num_experts >= 2 * ep
        if not (self.hardware.overlaps_collectives and between_nodes):
            return kind.moe_layers * 2 * links["all_to_all"].seconds(size)
        # Four exchanges of half the rows, of which at least the first and the last are waited for: see
        # fira/parallel/expert_parallel.py.
        half = links["all_to_all"].seconds(size / 2)
        return max(kind.moe_layers * 2 * half, kind.moe_layers * 4 * half - products)

    @cached_property
    def layer_actions(self) -> list[dict[ActionKind, float]]:
        """[layer][kind of action] seconds for one micro-batch."""
        recomputed = {i for stage in range(len(self.stages)) for i in self.recomputed(stage)}
        result = []
        for i, (cost, exchange) in enumerate(zip(self.layer_costs, self.exchange, strict=True)):
            forward = cost.forward + exchange[0]
            recompute = forward if i in recomputed else 0.0
            backward = cost.backward + exchange[1] + recompute
            # The backward of a recomputed layer is not split: all of it is part of the first half.
            backward_weight = 0.0 if i in recomputed else cost.backward_weight
            first_half = cost.backward if i in recomputed else cost.backward_input
            backward_input = first_half + exchange[1] + recompute
            if i in self.stages[0]:  # tokens have no gradient, so the full backward is done in the second half
                backward_input, backward_weight = 0.0, backward
            kinds = (ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)
            result.append(dict(zip(kinds, (forward, backward, backward_input, backward_weight), strict=True)))
        return result

    @cached_property
    def actions(self) -> dict[ActionKind, list[float]]:
        """[kind of action][stage] seconds."""
        return {kind: [sum(self.layer_actions[i][kind] for i in span) for span in self.stages] for kind in ActionKind}

    @cached_property
    def work(self) -> list[float]:
        """[rank] seconds of computation, exchange included, for one micro-batch."""
        kinds = (
            [ActionKind.FORWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT]
            if self.splits_backward
            else [ActionKind.FORWARD, ActionKind.BACKWARD]
        )
        work = [0.0] * self.layout.pp
        for stage, rank in enumerate(self.placement):
            work[rank] += sum(self.actions[kind][stage] for kind in kinds)
        return work

    def parameters(self, rank: int) -> tuple[float, float]:
        """Return the number of trained parameters of a rank: (those replicated over dp, those of its experts)."""
        kinds = [self.layer_kinds[i] for i in self.rank_layers[rank]]
        replicated = sum(kind.parameters for kind in kinds)
        if self.profile.tied and {0, len(self.profile.layers) - 1} <= set(self.rank_layers[rank]):
            replicated -= self.layer_kinds[0].largest
        return replicated, sum(kind.expert_parameters for kind in kinds) / self.layout.ep

    def updated(self, rank: int) -> list[TrainedParameter]:
        """The parameters that the replicas of a rank update: not a head's copy of a tied embedding."""
        result = [p for i in self.rank_layers[rank] for p in self.layer_kinds[i].trained]
        table = TrainedParameter(torch.Size((self.profile.config.vocab_size, self.profile.width)), False, False)
        if self.profile.tied and len(self.profile.layers) - 1 in self.rank_layers[rank] and table in result:
            result.remove(table)
        return result

    def hidden(self, rank: int) -> tuple[float, float]:
        """Return the elements of a rank's matrices that Muon updates: (replicated over dp, of its experts)."""
        hidden = [p for i in self.rank_layers[rank] for p in self.layer_kinds[i].hidden]
        experts = sum(p.size for p in hidden if p.expert)
        return sum(p.size for p in hidden) - experts, experts / self.layout.ep

    def frozen_parameters(self, rank: int) -> float:
        """The number of parameters of a rank that are not trained."""
        replicated, experts = map(sum, zip(*(self.layer_kinds[i].frozen for i in self.rank_layers[rank]), strict=True))
        if replicated and self.profile.tied and {0, len(self.profile.layers) - 1} <= set(self.rank_layers[rank]):
            replicated -= self.profile.config.vocab_size * self.profile.width
        return replicated + experts / self.layout.ep

    def cast_parameters(self, rank: int) -> float:
        """The number of parameters of a rank that autocast casts."""
        casts = [self.layer_kinds[i].cast for i in self.rank_layers[rank]]
        return sum(replicated + experts / self.layout.ep for replicated, experts in casts)

    def reduction(self, rank: int) -> float:
        """Seconds to reduce a rank's gradients: over dp, those of experts over edp, of a tied embedding over pp.

        Those of divided parameters are sent to their owners in each backward.
        """
        tied = self._tied_messages if rank == 0 else 0.0
        return tied + (0.0 if self.candidate.shard == "parameters" else self.over_replicas(*self.parameters(rank)))

    def layer_reduction(self, layer: int) -> float:
        """Seconds to reduce a layer's gradients over dp and edp, without those of a tied embedding."""
        kind, table = self.layer_kinds[layer], 0
        if self.profile.tied and layer in (0, len(self.profile.layers) - 1):
            table = self.layer_kinds[0].largest
        return self.over_replicas(kind.parameters - table, kind.expert_parameters / self.layout.ep)

    @cached_property
    def tied_reduction(self) -> float:
        """Seconds to reduce the gradient of a tied embedding over pp and dp; zero if the model has none."""
        return self._tied_messages + self.over_replicas(self.layer_kinds[0].largest, 0) if self.profile.tied else 0.0

    @cached_property
    def _tied_messages(self) -> float:
        """Seconds to send the gradient of a tied embedding to rank 0 and its value back."""
        if not self.profile.tied or self.layout.pp == 1:
            return 0.0
        table = self.element_size * self.layer_kinds[0].largest
        return 2 * self.hardware.links(self.layout.pp, self.layout.dp)["p2p"].seconds(table)

    def over_replicas(self, replicated: float, experts: float) -> float:
        """Seconds to reduce the gradients of `replicated` parameters over dp and of `experts` parameters over edp."""
        layout, seconds = self.layout, 0.0
        groups = ((layout.dp, 1), (layout.dp // layout.ep, layout.ep))
        for parameters, (size, stride) in zip((replicated, experts), groups, strict=True):
            if size > 1 and parameters:
                seconds += all_reduce_seconds(self.hardware.links(size, stride), size, self.element_size * parameters)
        return seconds


def all_reduce_seconds(links: Links, size: int, amount: float) -> float:
    """Seconds of an all-reduce of `amount` bytes over `size` ranks: the bandwidth of a ring, the latency of a tree."""
    link = links["all_reduce"]
    return 2 * math.ceil(math.log2(size)) * link.latency + 2 * (size - 1) / size * amount / link.bandwidth
