"""Three kinds of experts, and adapters of them. Dim 0 of a parameter is the expert; input rows are sorted by expert."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fira.nn.dropout import Dropout
from fira.nn.init import PerExpertInit
from fira.nn.kernels.fused import use_fused
from fira.nn.lora import Lora
from fira.nn.mlp import gated
from fira.nn.moe.grouped_linear import RowGroups, add_rows, fused_bias_gelu, grouped_linear
from fira.nn.moe.quantized_experts import QuantizedExperts


class ExpertBank(PerExpertInit, nn.Module):
    """Weights `w1`, `w2`, … [E, out, in] and biases `b1`, `b2`, … [E, out] of several experts.

    A subclass is called as `experts(x, groups, keys)`: x [n, d] sorted by expert, `groups` with the number of rows of
    each, keys [n] int32 for dropout or None. Experts without rows are included, so that every parameter has a gradient
    on every rank.
    lora: adapters of the weights by name; see `add_adapters`. random: whether there is dropout; otherwise keys are not
    moved to the experts.
    """

    lora_target = "experts"
    std: float | None = None
    random = False

    def __init__(self) -> None:
        super().__init__()
        self.lora = nn.ModuleDict()

    def add_adapters(self, lora: Lora) -> None:
        """Give every weight an adapter, which is sharded over ranks like the weight."""
        for name in self.matrices():
            self.lora[name] = ExpertAdapter(self.get_parameter(name), lora)

    def linear(self, x: Tensor, groups: RowGroups, name: str, bias: Tensor | None = None) -> Tensor:
        """x [n, in] → W x + bias [n, out] of each row's expert, with the adapter of the weight W called `name`."""
        weight = getattr(self, name)
        if isinstance(weight, QuantizedExperts):
            return weight(x, groups, bias)
        y = grouped_linear(x, groups, weight, bias)
        return add_rows(y, self.lora[name](x, groups)) if name in self.lora else y

    def init_parameter(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Fill one expert's slice from N(0, std²), or if std is None as torch.nn.Linear, uniform in ±1/√fan_in."""
        if self.std is None:
            bound = 1 / math.sqrt(self.get_parameter(f"w{name[1:]}").shape[2])
            value.uniform_(-bound, bound, generator=generator)
        else:
            value.normal_(std=self.std, generator=generator)

    def own_numel(self) -> int:
        """Number of weights, without biases, of one expert and its adapters."""
        adapters = sum(adapter.own_numel() for adapter in self.lora.children())  # type: ignore[operator]
        return adapters + sum(math.prod(self.get_parameter(name).shape[-2:]) for name in self.matrices())

    def matrices(self) -> list[str]:
        """The names of the weights, without biases."""
        return [name for name, _ in self.named_parameters(recurse=False) if name.startswith("w")]


class Experts(ExpertBank):
    """W2 drop(activation(W1 x + b1)) + b2."""

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        dropout: float,
        name: str,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.b1 = nn.Parameter(torch.empty(num_experts, d_ff))
        self.w2 = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.b2 = nn.Parameter(torch.empty(num_experts, d_model))
        self.dropout = Dropout(dropout, f"{name}.dropout")
        self.activation = activation
        self.random = dropout > 0

    def forward(self, x: Tensor, groups: RowGroups, keys: Tensor | None) -> Tensor:
        """[n, d] → [n, d]."""
        if use_fused(x) and self.activation is F.gelu:
            mask = None if keys is None or self.dropout.p == 0 else (keys, *self.dropout.hash_arguments)
            h = fused_bias_gelu(self.linear(x, groups, "w1"), groups, self.b1, mask)
        else:
            h = self.dropout(self.activation(self.linear(x, groups, "w1", self.b1)), keys)
        return self.linear(h, groups, "w2", self.b2)


class GatedExperts(ExpertBank):
    """W2 (activation(g) ⊙ a) with (g, a) = W1 x (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        activation: Callable[[Tensor], Tensor],
        std: float | None = None,
    ) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, 2 * d_ff, d_model))
        self.w2 = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.activation = activation
        self.std = std

    def forward(self, x: Tensor, groups: RowGroups, keys: Tensor | None) -> Tensor:
        """[n, d] → [n, d]."""
        h = gated(self.activation, self.linear(x, groups, "w1"))
        return self.linear(h, groups, "w2")


class LinearExperts(ExpertBank):
    """W1 x + b1 with output width `width`."""

    def __init__(self, num_experts: int, d_model: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, width, d_model))
        self.b1 = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, x: Tensor, groups: RowGroups, keys: Tensor | None) -> Tensor:
        """[n, d] → [n, width]."""
        return self.linear(x, groups, "w1", self.b1)


class ExpertAdapter(ExpertBank):
    """α/r · B A x of each row's expert, as in `fira.nn.lora`: `a` [E, r, in] and `b` [E, out, r].

    weight: the adapted one, [E, out, in].
    """

    def __init__(self, weight: Tensor, lora: Lora) -> None:
        super().__init__()
        num_experts, width, inner = weight.shape
        self.a = nn.Parameter(weight.new_empty(num_experts, lora.rank, inner))
        self.b = nn.Parameter(weight.new_empty(num_experts, width, lora.rank))
        self.scale = lora.scale

    def init_parameter(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Fill one expert's slice: A uniform in ±1/√fan_in, B zero."""
        bound = 1 / math.sqrt(value.shape[1]) if name == "a" else 0.0
        value.uniform_(-bound, bound, generator=generator)

    def matrices(self) -> list[str]:
        return ["a", "b"]

    def forward(self, x: Tensor, groups: RowGroups) -> Tensor:
        """[n, in] → [n, out]."""
        return grouped_linear(grouped_linear(x, groups, self.a) * self.scale, groups, self.b)
