"""The one place where a model meets the pipeline: it is cut into stages, experts are spread, weights are filled in.

The model does not know. A stage's parameters keep their global names, `layers.3.moe.experts.w1`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.models.language_model import LanguageModel
from fira.models.registry import build
from fira.nn.init import initialise
from fira.nn.moe.experts import ExpertBank
from fira.nn.moe.layer import MoE
from fira.parallel.expert_parallel import AllToAllDispatcher
from fira.parallel.objective import objective
from fira.parallel.tied_embedding import TiedWeight
from pipeline.engine import Engine
from pipeline.mesh import Mesh
from pipeline.partition import partition
from pipeline.schedule import SCHEDULES
from pipeline.stage import DeviceLayers, Stage
from pipeline.torchgpipe_stage import LocalPipeline

EVERY_BLOCK = sys.maxsize  # as the number of recomputed blocks of a stage: all of them


@dataclass(frozen=True)
class ParamShard:
    """A tensor as this rank holds it: the rows from `start` of a tensor whose global shape is `shape`.

    expert: dim 0 counts experts, which are spread over ep; any other parameter is held whole by all ranks of a stage.
    """

    name: str
    parameter: Tensor
    start: int
    shape: tuple[int, ...]
    expert: bool

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter, or each expert's slice of it, is a matrix; weight decay applies to these only."""
        return len(self.shape) - self.expert >= 2


@dataclass(frozen=True)
class Distributed:
    """A model as one rank trains it."""

    config: Any
    engine: Engine
    parts: list[ParamShard]  # what is trained
    buffers: list[ParamShard]  # what is saved with it
    moe: list[MoE]  # of this rank's layers
    tied: TiedWeight | None
    stages: list[range]  # the layers of each stage
    placement: tuple[int, ...]  # the rank of the pipeline that has each stage
    parameters: list[tuple[str, tuple[int, ...], bool]]  # of the whole model: name, shape, whether of experts
    moe_layers: list[int]  # of the whole model
    num_experts: int
    flops_per_token: float  # of the whole model's forward

    @property
    def device(self) -> torch.device:
        """Where what is known of all parts is put together: the first of this rank's."""
        return self.parts[0].parameter.device


def layer_costs(model: LanguageModel, seq_len: int) -> list[float]:
    """Forward FLOPs per token of each layer, as the layers say themselves."""
    return [float(layer.flops_per_token(seq_len)) for layer in model.layers]  # type: ignore[operator]


def parallelize(
    config: Any,
    mesh: Mesh,
    seq_len: int,
    seed: int,
    devices: Sequence[torch.device],
    schedule: str = "1f1b",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    recompute: int = 0,
) -> Distributed:
    """Build this rank's stages of the model of a config.

    devices: one, or several for torchgpipe to split each stage over. schedule: says which rank has which stages.
    recompute: how many blocks, of those between embedding and head, each stage computes again for its backward, the
    first ones, at most all; torchgpipe's stages all or none. dtype: of the parameters and of what crosses boundaries.
    The weights depend on the seed alone, not on the layout.
    """
    with torch.device("meta"):
        model = build(config).to(dtype)
    costs = layer_costs(model, seq_len)
    placement = SCHEDULES[schedule].placement(mesh.layout.pp)
    stages = partition(costs, len(placement))
    of_experts = _expert_tensors(model)
    parameters = [(name, tuple(p.shape), name in of_experts) for name, p in model.named_parameters()]
    buffers = [(name, tuple(b.shape), False) for name, b in model.named_buffers()]
    moe = [module for module in model.modules() if isinstance(module, MoE)]

    layers: dict[int, nn.Module] = {}  # of this rank
    mine: dict[int, Stage] = {}
    for number in (s for s, rank in enumerate(placement) if rank == mesh.pp_rank):
        held = [model.layers[i] for i in stages[number]]
        layers |= dict(zip(stages[number], held, strict=True))
        spans = partition([costs[i] for i in stages[number]], min(len(devices), len(held)))
        for device, span, group in zip(devices, spans, mesh.ep_groups, strict=False):
            for i in (stages[number][j] for j in span):
                first_expert = _spread_experts(layers[i], mesh, group)
                _to_empty(layers[i], device)
                initialise(layers[i], f"layers.{i}", seed, first_expert)
        if len(devices) > 1:
            balance = [len(span) for span in spans]
            local = LocalPipeline(held, balance, devices[: len(spans)], autocast=autocast, recompute=recompute > 0)
            mine[number] = Stage(local, devices[0])
        else:
            blocks = [place for place, i in enumerate(stages[number], 1) if 0 < i < len(model.layers) - 1]
            mine[number] = _stage(held, max([0, *blocks[:recompute]]), autocast, devices[0])
    tied = _tie(layers, len(model.layers), mesh.groups["pp"], placement) if model.tied else None
    return Distributed(
        config=config,
        engine=Engine(mine, objective, mesh.groups["pp"], mesh.groups["pp_backward"], dtype),
        parts=_parts(parameters, layers, mesh),
        buffers=_parts(buffers, layers, mesh),
        moe=[module for layer in layers.values() for module in layer.modules() if isinstance(module, MoE)],
        tied=tied,
        stages=stages,
        placement=placement,
        parameters=parameters,
        moe_layers=[module.index for module in moe],
        num_experts=max((module.num_experts for module in moe), default=0),
        flops_per_token=sum(costs),
    )


def _expert_tensors(model: nn.Module) -> set[str]:
    """The global names of the parameters whose dim 0 counts experts."""
    experts = ((path, module) for path, module in model.named_modules() if isinstance(module, ExpertBank))
    return {f"{path}.{name}" for path, module in experts for name, _ in module.named_parameters(recurse=False)}


def _stage(layers: list[nn.Module], cut: int, autocast: torch.dtype | None, device: torch.device) -> Stage:
    """A stage that computes the layers before the cut again for its backward."""
    again, once = DeviceLayers(layers[:cut], autocast, recompute=True), DeviceLayers(layers[cut:], autocast)
    if cut in (0, len(layers)):
        return Stage(again if cut else once, device)
    return Stage(once, device, before=again)


def _to_empty(layer: nn.Module, device: torch.device) -> None:
    """nn.Module.to_empty without its question to the meta device, which imports sympy: most of a second every start."""
    layer._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


def _spread_experts(layer: nn.Module, mesh: Mesh, group: dist.ProcessGroup) -> int:
    """Keep this rank's experts of a layer on the meta device; the number of the first of them."""
    ranks, first = mesh.layout.ep, 0
    for module in layer.modules():
        if isinstance(module, MoE) and ranks > 1:
            module.dispatcher = AllToAllDispatcher(group)
        if isinstance(module, ExpertBank):
            for name, parameter in list(module.named_parameters(recurse=False)):
                share = len(parameter) // ranks
                first = mesh.ep_rank * share
                setattr(module, name, nn.Parameter(parameter.detach()[first : first + share]))
    return first


def _tie(
    layers: Mapping[int, nn.Module], count: int, group: dist.ProcessGroup, placement: tuple[int, ...]
) -> TiedWeight:
    """Tie the head, the last of `count` layers, to the embedding, wherever they are (collective over the pipeline)."""
    original = layers[0].get_submodule("token").get_parameter("weight") if 0 in layers else None
    copy = None
    if count - 1 in layers:
        head = layers[count - 1].get_submodule("project")
        copy = head.get_parameter("weight")
        if original is not None and original.device == copy.device:
            copy = nn.Parameter(original.detach())
            head.register_parameter("weight", copy)
    tied = TiedWeight(original, copy, group, placement[0], placement[-1])
    tied.share_value()
    return tied


def _parts(
    tensors: list[tuple[str, tuple[int, ...], bool]], layers: Mapping[int, nn.Module], mesh: Mesh
) -> list[ParamShard]:
    """Those of the model's tensors (name, shape, whether of experts) that this rank's layers hold."""
    parts = []
    for name, shape, expert in tensors:
        _, index, path = name.split(".", 2)
        if int(index) in layers:
            module, _, last = path.rpartition(".")
            tensor = getattr(layers[int(index)].get_submodule(module), last)
            parts.append(ParamShard(name, tensor, mesh.ep_rank * len(tensor) if expert else 0, shape, expert))
    return parts
