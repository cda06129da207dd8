"""A model as the planner sees it: its layers, of which many are alike, and what each costs."""

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fira.models.registry import build
from fira.nn.context import Context
from fira.nn.cross_entropy import LOGITS
from fira.nn.moe.dispatcher import DispatchPlan, TokenDispatcher
from fira.nn.moe.experts import ExpertBank
from fira.nn.moe.grouped_linear import RowGroups
from fira.nn.moe.layer import MoE
from fira.nn.moe.permutation import sort_by_expert
from fira.parallel.parallelize import layer_costs
from pipeline.split_backward import SplitBackward
from pipeline.stage import Autocast


@dataclass(frozen=True)
class Cost:
    """One layer, one micro-batch, one rank that holds all experts.

    The head's forward computes the loss and what both gradients need (fira/nn/cross_entropy.py).
    """

    forward: float  # seconds
    input: float  # seconds for the gradient of the input
    weight: float  # … of the weights
    backward: float  # both, where they are not split
    kept: int  # bytes from forward to backward
    optimizer: float  # seconds a step
    working: int = 0  # bytes beside these while it computes
    noted: int = 0  # bytes from the first half of a split backward to the second


@dataclass(frozen=True)
class LayerKind:
    """Layers that cost the same."""

    layer: nn.Module  # one of them, on the meta device
    parameters: int  # held whole
    expert_parameters: int  # spread over ep
    largest: int  # elements of the largest parameter
    exchanges: int  # MoE layers in it, each of which sends tokens to experts and back
    copies: float  # experts that a token goes to


@dataclass(frozen=True)
class ModelProfile:
    """What a plan depends on of a model."""

    config: Any
    kinds: list[LayerKind]
    layers: list[int]  # the kind of each layer
    flops: list[float]  # of each layer's forward per token, by which layers are dealt to stages
    tied: bool

    @property
    def tokens(self) -> int:
        """Per sequence."""
        return self.config.seq_len

    @property
    def width(self) -> int:
        """Of the tensor that crosses from layer to layer."""
        return self.config.d_model

    @property
    def num_experts(self) -> int:
        return getattr(self.config, "num_experts", 1)


def profile_of(config: Any) -> ModelProfile:
    """The shape of a config's model, which is not filled with weights."""
    with torch.device("meta"):
        model = build(config)
    kinds: dict[Any, int] = {}
    found: list[LayerKind] = []
    layers = []
    flops = layer_costs(model, config.seq_len)
    for layer, cost in zip(model.layers, flops, strict=True):
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        key = type(layer), cost, shapes
        if key not in kinds:
            kinds[key] = len(found)
            found.append(_kind(layer))
        layers.append(kinds[key])
    return ModelProfile(config, found, layers, flops, model.tied)


def _kind(layer: nn.Module) -> LayerKind:
    moe = [module for module in layer.modules() if isinstance(module, MoE)]
    banks = [module for module in layer.modules() if isinstance(module, ExpertBank)]
    of_experts = sum(p.numel() for bank in banks for p in bank.parameters(recurse=False))
    sizes = [p.numel() for p in layer.parameters()]
    copies = max((module.router.top_k for module in moe), default=0)
    return LayerKind(layer, sum(sizes) - of_experts, of_experts, max(sizes), len(moe), copies)


class EvenDispatcher(TokenDispatcher):
    """Every expert gets as many tokens as any other, whatever the router says: nobody looks at a value."""

    def plan(self, experts: Tensor, num_experts: int, dropped: bool = False) -> DispatchPlan:
        flat = experts.flatten()
        edges = [e * len(flat) // num_experts for e in range(num_experts + 1)]
        sizes = [end - start for start, end in pairwise(edges)]
        return DispatchPlan(
            *sort_by_expert(flat), RowGroups(torch.tensor(sizes, device=flat.device), dict(enumerate(sizes)))
        )


def kept_bytes(
    profile: ModelProfile, kind: int, microbatch: int, autocast: torch.dtype | None = None
) -> tuple[int, int]:
    """What is kept of one micro-batch for the backward of a layer, and what from its first half to its second, found
    without computing anything.

    autocast: the precision of products. Their weights' copies in it are kept as well, for every micro-batch in flight.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports torch's compiler, which takes seconds

    size = (microbatch, profile.tokens)
    layer = copy.deepcopy(profile.kinds[kind].layer)
    with FakeTensorMode():
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
            if isinstance(module, MoE):
                module.dispatcher = EvenDispatcher()
        first = kind == profile.layers[0]
        x = torch.empty(size, dtype=torch.int64) if first else torch.empty(*size, profile.width, requires_grad=True)
        keys = torch.empty(microbatch, dtype=torch.int64)
        targets = torch.empty(size, dtype=torch.int64)
        context = Context(torch.empty(microbatch), None, targets, keys, torch.empty(microbatch))
        return bytes_kept(Autocast(layer, autocast), x, context)


def working_bytes(profile: ModelProfile, microbatch: int, device: str) -> int:
    """The head's logits, as many as there are at a time: of the product, of the softmax, and their gradients."""
    tokens = microbatch * profile.tokens
    rows = max(256, LOGITS[device] // profile.config.vocab_size)
    return 3 * 4 * min(tokens, rows) * profile.config.vocab_size


def bytes_kept(layer: nn.Module, x: Tensor, context: Context) -> tuple[int, int]:
    """What autograd keeps of a layer's forward beside its parameters, and what a split backward holds in its middle."""
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x, context)
    noted = 0
    if x.is_floating_point():
        split = SplitBackward(y, x)
        split.backward_input(torch.ones_like(y))
        noted = split.saved_bytes()
    for parameter in layer.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), noted
