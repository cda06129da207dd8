"""The profile of a model: kinds of layers, their sizes, and the memory that they save for their backward."""

import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fira.models.language_model import LanguageModel
from fira.nn.context import Context, TrainingContext
from fira.nn.cross_entropy import rows_per_block
from fira.nn.lora import Lora
from fira.nn.moe.dispatcher import DispatchPlan, TokenDispatcher
from fira.nn.moe.experts import ExpertBank
from fira.nn.moe.grouped_linear import RowGroups
from fira.nn.moe.layer import MoE
from fira.nn.moe.permutation import sort_by_expert
from fira.parallel.cast_weights import cast_parameters, cast_weights
from fira.parallel.parallelize import layer_flops
from fira.parallel.rank_optimizer import not_hidden
from fira.planner.tensor_memory import LayerMemory, measure_layer_memory
from pipeline.stage import Autocast

LONGEST = 2**14  # tokens of a sequence whose memory is measured


class TrainedParameter(NamedTuple):
    """A trained parameter of a layer.

    expert: whether dim 0 counts experts, which are sharded over ep; other parameters are replicated over dp. hidden:
    whether Muon updates it, so that it has one moment; AdamW has two.
    """

    shape: torch.Size
    expert: bool
    hidden: bool

    @property
    def size(self) -> int:
        """Elements."""
        return self.shape.numel()

    @property
    def moments(self) -> int:
        """Elements of its moments."""
        return self.size if self.hidden else 2 * self.size


@dataclass(frozen=True)
class LayerKind:
    """A group of layers with equal costs.

    frozen, cast: elements of parameters that are not trained, and of those that autocast casts: replicated over dp, and
    sharded over ep.
    """

    layer: nn.Module  # one layer of this kind, on the meta device
    trained: tuple[TrainedParameter, ...]
    frozen: tuple[int, int]
    cast: tuple[int, int]
    moe_layers: int  # MoE modules in the layer, each with an all-to-all to the experts and back
    top_k: float  # experts per token

    @cached_property
    def parameters(self) -> int:
        """Elements of the trained parameters that are replicated over dp."""
        return sum(p.size for p in self.trained if not p.expert)

    @cached_property
    def expert_parameters(self) -> int:
        """Elements of the trained parameters that are sharded over ep."""
        return sum(p.size for p in self.trained if p.expert)

    @cached_property
    def hidden(self) -> list[TrainedParameter]:
        """The matrices, or stacks of matrices, that Muon updates."""
        return [p for p in self.trained if p.hidden]

    @property
    def largest(self) -> int:
        """Elements of the largest trained parameter."""
        return max((p.size for p in self.trained), default=0)

    @property
    def trained_share(self) -> float:
        """Fraction of the parameters that are trained."""
        trained = self.parameters + self.expert_parameters
        return trained / (trained + sum(self.frozen))


@dataclass(frozen=True)
class ModelProfile:
    """The properties of a model that the planner uses."""

    config: Any
    kinds: list[LayerKind]
    layers: list[int]  # the kind of each layer
    flops: list[float]  # forward FLOPs per token of each layer, by which layers are assigned to stages
    tied: bool
    lora: Lora | None
    optimizer: str

    @property
    def tokens(self) -> int:
        """Tokens per sequence."""
        return self.config.seq_len

    @property
    def width(self) -> int:
        """Last dim of the tensor between layers."""
        return self.config.d_model

    @property
    def num_experts(self) -> int:
        return getattr(self.config, "num_experts", 1)


def profile_of(model: LanguageModel, optimizer: str = "adamw") -> ModelProfile:
    """The profile of a model on the meta device. optimizer: a value of --optimizer."""
    kinds: dict[Any, LayerKind] = {}
    keys = []
    flops = layer_flops(model)
    for i, (layer, layer_cost) in enumerate(zip(model.layers, flops, strict=True)):
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        keys.append((type(layer), layer_cost, shapes))
        if keys[-1] not in kinds:
            kinds[keys[-1]] = _kind(layer, optimizer == "muon" and 0 < i < len(model.layers) - 1)
    numbers = {key: number for number, key in enumerate(kinds)}
    layers = [numbers[key] for key in keys]
    return ModelProfile(model.config, list(kinds.values()), layers, flops, model.tied, model.lora, optimizer)


def _kind(layer: nn.Module, has_hidden: bool) -> LayerKind:
    """The kind of a layer. has_hidden: whether Muon updates its matrices."""
    moe = [module for module in layer.modules() if isinstance(module, MoE)]
    banks = [module for module in layer.modules() if isinstance(module, ExpertBank)]
    experts = {p for bank in banks for p in bank.parameters(recurse=False)}
    others = not_hidden(layer.modules())
    trained, frozen, cast = [], [0, 0], [0, 0]
    for p in layer.parameters():
        expert = p in experts
        if p.requires_grad:
            is_hidden = has_hidden and p.dim() - expert >= 2 and p not in others
            trained.append(TrainedParameter(p.shape, expert, is_hidden))
        else:
            frozen[expert] += p.numel()
    for module, name in cast_parameters(layer):
        cast[isinstance(module, ExpertBank)] += module.get_parameter(name).numel()
    top_k = max((module.router.top_k for module in moe), default=0)
    return LayerKind(layer, tuple(trained), (frozen[0], frozen[1]), (cast[0], cast[1]), len(moe), top_k)


class EvenDispatcher(TokenDispatcher):
    """Assigns the same number of tokens to every expert, because fake tensors have no values to route by."""

    def plan(self, experts: Tensor, num_experts: int, dropped: bool = False) -> DispatchPlan:
        flat = experts.flatten()
        edges = [e * len(flat) // num_experts for e in range(num_experts + 1)]
        sizes = [end - start for start, end in pairwise(edges)]
        return DispatchPlan(
            *sort_by_expert(flat), RowGroups(torch.tensor(sizes, device=flat.device), dict(enumerate(sizes)))
        )


def layer_memory(profile: ModelProfile, kind: int, microbatch: int, autocast: torch.dtype | None = None) -> LayerMemory:
    """`measure_layer_memory` of one kind of layer for one micro-batch, on fake tensors, without computing anything.

    autocast: the dtype of matrix products. The copies of weights in this dtype are not counted. Sequences longer than
    LONGEST tokens are extrapolated, because the time grows with the length.
    """
    tokens = min(profile.tokens, LONGEST)
    memory = _fake_layer_memory(profile, kind, microbatch, tokens, autocast)
    if tokens == profile.tokens:
        return memory
    half = _fake_layer_memory(profile, kind, microbatch, tokens // 2, autocast)
    steps = profile.tokens / (tokens // 2) - 2
    return memory.map(lambda a, b: a + steps * (a - b), half)


def _fake_layer_memory(
    profile: ModelProfile, kind: int, microbatch: int, tokens: int, autocast: torch.dtype | None
) -> LayerMemory:
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports torch's compiler, which takes seconds

    size = (microbatch, tokens)
    layer = copy.deepcopy(profile.kinds[kind].layer)
    with FakeTensorMode():
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
            if isinstance(module, MoE):
                module.dispatcher = EvenDispatcher()
        is_first = kind == profile.layers[0]
        x = torch.empty(size, dtype=torch.int64) if is_first else torch.empty(*size, profile.width, requires_grad=True)
        keys = torch.empty(microbatch, dtype=torch.int64)
        targets = torch.empty(size, dtype=torch.int64)
        training = TrainingContext(targets, aux_weights=torch.empty(microbatch))
        tokens_of_input = torch.empty(size, dtype=torch.int64)
        context = Context(lengths=torch.empty(microbatch), keys=keys, tokens=tokens_of_input, training=training)
        parameters, wrapped = [*layer.parameters()], Autocast(layer, autocast)
        with cast_weights(wrapped.modules()):
            return measure_layer_memory(wrapped, x, context, parameters)


def logits_bytes(profile: ModelProfile, microbatch: int, device: str) -> int:
    """Bytes of the head's logits, their softmax and their gradient, for the tokens that are processed at a time."""
    rows = rows_per_block(device, profile.config.vocab_size)
    return 3 * 4 * min(microbatch * profile.tokens, rows) * profile.config.vocab_size
