"""Build this rank's stages of a model: the only module in which a model meets the pipeline.

    model on the meta device
        → partition   contiguous layers to stages, stages to the ranks of the pipeline
        → shard       each ExpertBank keeps the experts of this ep rank; MoE layers get an all-to-all dispatcher
        → initialise  memory is allocated; weights are drawn from generators seeded by the parameters' global names
        → divide      with --shard parameters, each layer keeps the parameters that this rank owns
        → tie         the head's copy of a tied embedding gets the embedding's values
        → Engine      runs the stages by a schedule

Models contain no distributed code. Parameters keep their global names, such as `layers.3.moe.experts.w1`.
"""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.models.language_model import LanguageModel
from fira.nn.init import initialise
from fira.nn.lora import Lora
from fira.nn.moe.experts import ExpertBank
from fira.nn.moe.layer import MoE
from fira.nn.value_embedding import ValueEmbedding
from fira.parallel.cast_weights import CastCopy
from fira.parallel.expert_parallel import AllToAllDispatcher
from fira.parallel.layer_weights import LayerWeights, divide_tied
from fira.parallel.microbatch_loss import microbatch_loss
from fira.parallel.param_shard import GlobalTensor, ParamShard
from fira.parallel.rank_shards import TABLE, RankShards
from fira.parallel.tied_embedding import TiedWeight, tie
from pipeline.engine import Engine
from pipeline.mesh import Mesh
from pipeline.partition import partition
from pipeline.schedule import SCHEDULES
from pipeline.stage import DeviceLayers, Stage
from pipeline.torchgpipe_stage import LocalPipeline

EVERY_BLOCK = sys.maxsize  # as a number of recomputed blocks per stage: all blocks


@dataclass(frozen=True)
class DistributedModel:
    """This rank's part of a model, and the properties of the whole model.

    With adapters, the other parameters and the buffers are frozen: they are read from the base model, but not trained
    and not saved. Otherwise nothing is frozen.
    """

    config: Any
    lora: Lora | None
    engine: Engine
    shards: list[ParamShard]  # of trained parameters
    buffers: list[ParamShard]
    frozen: list[ParamShard]
    moe: list[MoE]  # of this rank's layers
    tied: TiedWeight | None  # if it is trained
    shard: str | None  # what the replicas divide, see `fira/parallel/param_shard.py`
    weights: dict[int, LayerWeights]  # by layer; empty unless the replicas divide the parameters
    stages: list[range]  # the layers of each stage
    placement: tuple[int, ...]  # the pp rank of each stage
    parameters: list[GlobalTensor]  # of the whole model, those that are trained
    moe_layers: list[int]  # indices of the whole model's MoE layers
    num_experts: int
    flops_per_token: float  # forward FLOPs of the whole model

    @property
    def device(self) -> torch.device:
        """The first of this rank's devices, on which results of all its layers are combined."""
        return next(iter(self.engine.stages.values())).input_device

    @property
    def cast_copies(self) -> dict[nn.Module, list[CastCopy]]:
        """The copies for autocast of each layer with divided parameters, see `cast_weights`."""
        return {weights.layer: weights.copies for weights in self.weights.values()}

    def modules(self) -> Iterator[nn.Module]:
        """All modules of this rank's layers, and those that wrap them."""
        for stage in self.engine.stages.values():
            for segment in stage.segments:
                yield from segment.modules()

    def value_tables(self) -> set[str]:
        """The names of the trained tables of value embeddings."""
        tables = {id(module.table.weight) for module in self.modules() if isinstance(module, ValueEmbedding)}
        return {shard.name for shard in self.shards if id(shard.parameter) in tables}


def layer_flops(model: LanguageModel) -> list[float]:
    """Forward FLOPs per token of each layer, in sequences of the model's context length."""
    return [float(layer.flops_per_token(model.config.seq_len)) for layer in model.layers]  # type: ignore[operator]


def parallelize(
    model: LanguageModel,
    mesh: Mesh,
    seed: int,
    devices: Sequence[torch.device],
    schedule: str = "1f1b",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    recompute: int = 0,
    shard: str | None = None,
) -> DistributedModel:
    """Build this rank's stages of a model, with weights that depend on the seed but not on the layout (collective).

    model: on the meta device; it is not modified. devices: one, or several for torchgpipe to split each stage over.
    schedule: determines the number of stages and which rank holds which of them. dtype: of parameters. autocast: of
    matrix products and of messages between ranks; None: no autocast. recompute: number of blocks that each stage
    recomputes in its backward, counted from its first block; embedding and head are not blocks. Stages split by
    torchgpipe recompute all blocks or none. shard: what the replicas divide, "optimizer" or "parameters"; the latter
    with one device only.
    """
    flops = layer_flops(model)
    placement = SCHEDULES[schedule].placement(mesh.layout.pp)
    stages = partition(flops, len(placement))
    moe = [module for module in model.modules() if isinstance(module, MoE)]

    layers: dict[int, nn.Module] = {}  # of this rank
    rank_stages: dict[int, Stage] = {}
    numbers = [number for number, rank in enumerate(placement) if rank == mesh.pp_rank]
    shards = RankShards(model, mesh, shard, {i for number in numbers for i in stages[number]})
    for number in numbers:
        spans = _device_spans(stages[number], flops, len(devices))
        stage_layers = _initialised_layers(model, spans, devices, mesh, seed, dtype, shards)
        layers |= stage_layers
        if len(devices) > 1:
            rank_stages[number] = _local_pipeline_stage(stage_layers, spans, devices, autocast, recompute > 0)
        else:
            blocks = [place for place, i in enumerate(stage_layers, 1) if 0 < i < len(model.layers) - 1]
            cut = max([0, *blocks[:recompute]])
            rank_stages[number] = _stage(stage_layers, cut, autocast, devices[0], shards.weights)
    tied = tie(layers, len(model.layers), mesh.groups["pp"], placement) if model.tied else None
    if tied and shards.weights and {0, len(model.layers) - 1} & layers.keys():
        divide_tied(tied, shards.weights, len(model.layers) - 1, mesh)
    if model.lora and tied:
        shards.frozen += _frozen_copy(tied)
        tied = None
    return DistributedModel(
        config=model.config,
        lora=model.lora,
        engine=Engine(rank_stages, microbatch_loss, mesh.pp_rank, mesh.channels, dtype, autocast),
        shards=shards.trained,
        buffers=shards.buffers,
        frozen=shards.frozen,
        moe=[module for layer in layers.values() for module in layer.modules() if isinstance(module, MoE)],
        tied=tied,
        shard=shard,
        weights=shards.weights,
        stages=stages,
        placement=placement,
        parameters=shards.parameters,
        moe_layers=[module.index for module in moe],
        num_experts=max((module.num_experts for module in moe), default=0),
        flops_per_token=sum(flops),
    )


def _device_spans(stage: range, flops: Sequence[float], devices: int) -> list[range]:
    """The layers of a stage by device; there are fewer spans than devices if the stage has fewer layers."""
    spans = partition([flops[i] for i in stage], min(devices, len(stage)))
    return [stage[span.start : span.stop] for span in spans]


def _initialised_layers(
    model: LanguageModel,
    spans: Sequence[range],
    devices: Sequence[torch.device],
    mesh: Mesh,
    seed: int,
    dtype: torch.dtype,
    shards: RankShards,
) -> dict[int, nn.Module]:
    """Copies of the layers `spans[j]` on `devices[j]`, by index, with this rank's experts and their initial weights.

    shards: gets each of them.
    """
    layers = {}
    for span, device, group in zip(spans, devices, mesh.ep_groups, strict=False):
        for i in span:
            layers[i] = copy.deepcopy(model.layers[i])
            first_expert = _shard_experts(layers[i], mesh, group)
            _to_empty(layers[i], device, dtype)
            initialise(layers[i], f"layers.{i}", seed, first_expert)
            if mesh.separates_sources:
                _expand_experts(layers[i], mesh.layout.ep)
            shards.add(i, layers[i])
    return layers


def _local_pipeline_stage(
    layers: Mapping[int, nn.Module],
    spans: Sequence[range],
    devices: Sequence[torch.device],
    autocast: torch.dtype | None,
    recompute: bool,
) -> Stage:
    """A stage that torchgpipe splits over several devices of this process."""
    balance = [len(span) for span in spans]
    local = LocalPipeline([*layers.values()], balance, devices[: len(spans)], autocast=autocast, recompute=recompute)
    return Stage(local, devices[0])


def _stage(
    stage_layers: dict[int, nn.Module],
    cut: int,
    autocast: torch.dtype | None,
    device: torch.device,
    weights: Mapping[int, LayerWeights],
) -> Stage:
    """A stage that recomputes its first `cut` layers in the backward. With `weights`, each layer is a segment."""
    first, layers = min(stage_layers), [*stage_layers.values()]
    cuts = range(len(layers) + 1) if weights else sorted({0, cut, len(layers)})
    *before, last = (
        DeviceLayers(layers[start:stop], autocast, recompute=start < cut, first=first + start)
        for start, stop in pairwise(cuts)
    )
    if not weights:
        return Stage(last, device, before)
    return Stage(last, device, before, around=lambda segment: weights[first + segment].used())


def _to_empty(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace tensors by uninitialised ones on a device, where floating-point tensors get the given dtype.

    nn.Module.to_empty does the same but queries the meta device, which imports sympy: 0.5 to 1 s at every start.
    """

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=device)

    layer._apply(empty)


def _shard_experts(layer: nn.Module, mesh: Mesh, group: dist.ProcessGroup) -> int:
    """Reduce a layer on the meta device to the experts of this ep rank; returns the number of the first of them."""
    ranks, first = mesh.layout.ep, 0
    for module in layer.modules():
        if isinstance(module, MoE) and ranks > 1:
            parts = 2 if mesh.ep_between_machines else 1
            module.dispatcher = AllToAllDispatcher(group, parts, by_source=mesh.separates_sources)
        if isinstance(module, ExpertBank):
            for name, parameter in list(module.named_parameters(recurse=False)):
                count = len(parameter) // ranks
                first = mesh.ep_rank * count
                shard = parameter.detach()[first : first + count]
                setattr(module, name, nn.Parameter(shard, parameter.requires_grad))
    return first


def _expand_experts(layer: nn.Module, ranks: int) -> None:
    """Expand experts' parameters to [ranks, …] without copies, so that each has one gradient per sending rank."""
    for module in layer.modules():
        if isinstance(module, ExpertBank):
            for name, parameter in list(module.named_parameters(recurse=False)):
                expanded = parameter.detach().expand(ranks, *parameter.shape)
                setattr(module, name, nn.Parameter(expanded, parameter.requires_grad))


def _frozen_copy(tied: TiedWeight) -> list[ParamShard]:
    """The head's copy of a frozen embedding as a shard of its own, which is read like the embedding."""
    if tied.copy is None:
        return []
    return [ParamShard(TABLE, tied.copy, 0, tuple(tied.copy.shape), False, tied.copy, kept=tied.kept)]
