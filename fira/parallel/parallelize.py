"""Build this rank's stages of a model: the only module in which a model meets the pipeline.

    model on the meta device
        → partition   contiguous layers to stages, stages to the ranks of the pipeline
        → shard       each ExpertBank keeps the experts of this ep rank; MoE layers get an all-to-all dispatcher
        → initialise  memory is allocated; weights are drawn from generators seeded by the parameters' global names
        → tie         the head's copy of a tied embedding gets the embedding's values
        → Engine      runs the stages by a schedule

Models contain no distributed code. Parameters keep their global names, such as `layers.3.moe.experts.w1`.
"""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.models.language_model import LanguageModel
from fira.nn.init import initialise
from fira.nn.lora import Lora
from fira.nn.moe.experts import ExpertBank
from fira.nn.moe.layer import MoE
from fira.nn.value_embedding import ValueEmbedding
from fira.parallel.expert_parallel import AllToAllDispatcher
from fira.parallel.microbatch_loss import microbatch_loss
from fira.parallel.tied_embedding import TiedWeight, tie
from pipeline.engine import Engine
from pipeline.mesh import Mesh
from pipeline.partition import partition
from pipeline.schedule import SCHEDULES
from pipeline.stage import DeviceLayers, Stage
from pipeline.torchgpipe_stage import LocalPipeline

EVERY_BLOCK = sys.maxsize  # as a number of recomputed blocks per stage: all blocks


class GlobalTensor(NamedTuple):
    """A parameter or buffer of the whole model. expert: whether dim 0 counts experts."""

    name: str
    shape: tuple[int, ...]
    expert: bool


@dataclass(frozen=True)
class ParamShard:
    """This rank's shard of a parameter or buffer: the rows from `start` of a tensor of global shape `shape`.

    expert: dim 0 counts experts and is sharded over ep. Any other tensor is replicated on all ranks of a stage, and its
    shard is the whole tensor.
    leaf: the tensor for which autograd computes gradients; the parameter itself, or for experts on R ranks its
    expansion [R, …] with one gradient per sending rank, see `AllToAllDispatcher`.
    """

    name: str
    parameter: Tensor
    start: int
    shape: tuple[int, ...]
    expert: bool
    leaf: Tensor

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter, or each expert's slice of it, is a matrix; weight decay applies to these only."""
        return len(self.shape) - self.expert >= 2


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
) -> DistributedModel:
    """Build this rank's stages of a model, with weights that depend on the seed but not on the layout (collective).

    model: on the meta device; it is not modified. devices: one, or several for torchgpipe to split each stage over.
    schedule: determines the number of stages and which rank holds which of them. dtype: of parameters. autocast: of
    matrix products and of messages between ranks; None: no autocast. recompute: number of blocks that each stage
    recomputes in its backward, counted from its first block; embedding and head are not blocks. Stages split by
    torchgpipe recompute all blocks or none.
    """
    flops = layer_flops(model)
    placement = SCHEDULES[schedule].placement(mesh.layout.pp)
    stages = partition(flops, len(placement))
    parameters, frozen = _parameters(model, trained=True), _parameters(model, trained=False)
    buffers = [GlobalTensor(name, tuple(b.shape), False) for name, b in model.named_buffers()]
    if model.lora:
        buffers, frozen = [], [*frozen, *buffers]
    moe = [module for module in model.modules() if isinstance(module, MoE)]

    layers: dict[int, nn.Module] = {}  # of this rank
    rank_stages: dict[int, Stage] = {}
    for number in (s for s, rank in enumerate(placement) if rank == mesh.pp_rank):
        spans = _device_spans(stages[number], flops, len(devices))
        stage_layers = _initialised_layers(model, spans, devices, mesh, seed, dtype)
        layers |= stage_layers
        if len(devices) > 1:
            rank_stages[number] = _local_pipeline_stage(stage_layers, spans, devices, autocast, recompute > 0)
        else:
            blocks = [place for place, i in enumerate(stage_layers, 1) if 0 < i < len(model.layers) - 1]
            cut = max([0, *blocks[:recompute]])
            rank_stages[number] = _stage(stage_layers, cut, autocast, devices[0])
    tied = tie(layers, len(model.layers), mesh.groups["pp"], placement) if model.tied else None
    frozen_shards = _shards(frozen, layers, mesh)
    if model.lora and tied:
        frozen_shards += _frozen_copy(tied)
        tied = None
    return DistributedModel(
        config=model.config,
        lora=model.lora,
        engine=Engine(rank_stages, microbatch_loss, mesh.pp_rank, mesh.channels, dtype, autocast),
        shards=_shards(parameters, layers, mesh),
        buffers=_shards(buffers, layers, mesh),
        frozen=frozen_shards,
        moe=[module for layer in layers.values() for module in layer.modules() if isinstance(module, MoE)],
        tied=tied,
        stages=stages,
        placement=placement,
        parameters=parameters,
        moe_layers=[module.index for module in moe],
        num_experts=max((module.num_experts for module in moe), default=0),
        flops_per_token=sum(flops),
    )


def _parameters(model: nn.Module, trained: bool) -> list[GlobalTensor]:
    """The parameters of the whole model that are trained, or those that are frozen."""
    banks = ((path, module) for path, module in model.named_modules() if isinstance(module, ExpertBank))
    experts = {f"{path}.{name}" for path, bank in banks for name, _ in bank.named_parameters(recurse=False)}
    return [
        GlobalTensor(name, tuple(p.shape), name in experts)
        for name, p in model.named_parameters()
        if p.requires_grad == trained
    ]


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
) -> dict[int, nn.Module]:
    """Copies of the layers `spans[j]` on `devices[j]`, by index, with this rank's experts and their initial weights."""
    layers = {}
    for span, device, group in zip(spans, devices, mesh.ep_groups, strict=False):
        for i in span:
            layers[i] = copy.deepcopy(model.layers[i])
            first_expert = _shard_experts(layers[i], mesh, group)
            _to_empty(layers[i], device, dtype)
            initialise(layers[i], f"layers.{i}", seed, first_expert)
            if mesh.separates_sources:
                _expand_experts(layers[i], mesh.layout.ep)
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


def _stage(stage_layers: dict[int, nn.Module], cut: int, autocast: torch.dtype | None, device: torch.device) -> Stage:
    """A stage that recomputes its first `cut` layers in the backward."""
    first, layers = min(stage_layers), [*stage_layers.values()]
    recomputed = DeviceLayers(layers[:cut], autocast, recompute=True, first=first)
    regular = DeviceLayers(layers[cut:], autocast, first=first + cut)
    if cut in (0, len(layers)):
        return Stage(recomputed if cut else regular, device)
    return Stage(regular, device, before=recomputed)


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
    return [ParamShard("layers.0.token.weight", tied.copy, 0, tuple(tied.copy.shape), False, tied.copy)]


def _shards(tensors: Sequence[GlobalTensor], layers: Mapping[int, nn.Module], mesh: Mesh) -> list[ParamShard]:
    """This rank's shards of the given tensors, for those that belong to its layers."""
    shards = []
    for name, shape, expert in tensors:
        _, index, path = name.split(".", 2)
        if int(index) in layers:
            module, _, attribute = path.rpartition(".")
            leaf = tensor = getattr(layers[int(index)].get_submodule(module), attribute)
            if expert and mesh.separates_sources:
                tensor = nn.Parameter(leaf.detach()[0])
            shards.append(ParamShard(name, tensor, mesh.ep_rank * len(tensor) if expert else 0, shape, expert, leaf))
    return shards
