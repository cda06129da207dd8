"""Low-rank adapters of linear layers: LoRA (Hu et al. 2021, arXiv 2106.09685).

Shapes: n tokens, rank r, scaling α/r.

    x [n, in] ──┬── W x + b ──────────────── + ──→ y [n, out]       W [out, in] and b [out] are frozen
                └── α/r · A x [n, r] ── B ───┘                      A [r, in] and B [out, r] are trained

A is initialised uniformly in ±1/√in and B with zeros, so that new adapters do not change the model. The adapters of
experts are in `fira.nn.moe.experts`, and `fira.models.adapters` adds both to a model.
"""

from argparse import ArgumentTypeError
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fira.errors import UserError
from fira.nn.autocast import product_dtype
from fira.value_types import Positive, Size, flag_type

# Modules name the target that their linear layers or matrices belong to in the attribute `lora_target`.
TARGETS = ("attention", "experts", "head")
FORM = "rank=8,alpha=16,targets=attention+experts+head"


@dataclass(frozen=True)
class Lora:
    """Settings of the adapters. targets: the modules whose matrices have adapters, in the order of TARGETS."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Parse a text such as FORM. Raises UserError if it is invalid."""
        items = [item.partition("=")[::2] for item in text.split(",")]
        values = dict(items)
        if len(values) < len(items) or values.keys() != {"rank", "alpha", "targets"}:
            raise UserError(f"--lora {text:.80}: give rank, alpha and targets once each, as in {FORM}")
        targets = values["targets"].split("+")
        if unknown := [target for target in targets if target not in TARGETS]:
            raise UserError(f"--lora {text:.80}: no target {unknown[0]!r}; the targets are {', '.join(TARGETS)}")
        try:
            rank, alpha = flag_type(Size)(values["rank"]), flag_type(Positive)(values["alpha"])
        except ArgumentTypeError as error:
            raise UserError(f"--lora {text:.80}: {error}") from None
        return cls(rank, alpha, tuple(target for target in TARGETS if target in targets))

    def __str__(self) -> str:
        return f"rank={self.rank},alpha={self.alpha:g},targets={'+'.join(self.targets)}"

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank


def adapter_names(weight: str) -> tuple[str, str]:
    """Return the global names of the matrices A and B of a weight's adapter."""
    path, _, name = weight.rpartition(".")
    adapter = "lora_{}.weight" if name == "weight" else f"lora.{name}.{{}}"
    return f"{path}.{adapter.format('a')}", f"{path}.{adapter.format('b')}"


class LoraLinear(nn.Linear):
    """A linear layer with an adapter. It takes over the parameters of `base`."""

    def __init__(self, base: nn.Linear, lora: Lora) -> None:
        device, dtype = base.weight.device, base.weight.dtype
        super().__init__(base.in_features, base.out_features, base.bias is not None, device, dtype)
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Linear(base.in_features, lora.rank, False, device, dtype)  # its default initialisation is A's
        self.lora_b = _Zeros(lora.rank, base.out_features, False, device, dtype)
        self.scale = lora.scale

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        return super().forward(x) + self.lora_b(self.lora_a(x) * self.scale)

    def as_one_product(self, x: Tensor, cast_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x, α/r · A x) […, in + r], B [out, r], and (W, B) [out, in + r] in the precision of products.

        The output is the product of the first and the last one, for losses that do not compute all outputs at once.
        cast_weight: W in the precision of products; None: it is cast here.
        """
        b, dtype = self.lora_b.weight, product_dtype(x)
        factor = torch.cat([self.weight.to(dtype) if cast_weight is None else cast_weight, b.detach().to(dtype)], 1)
        return torch.cat([x, self.lora_a(x) * self.scale], -1), b, factor


class _Zeros(nn.Linear):
    """A Linear whose initial weight is zero."""

    def init_parameter(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        value.zero_()
