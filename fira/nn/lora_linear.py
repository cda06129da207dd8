"""Low-rank adapters of linear layers: LoRA (Hu et al. 2021, arXiv 2106.09685).

Shapes: n tokens, rank r, scaling α/r.

    x [n, in] ──┬── W x + b ──────────────── + ──→ y [n, out]       W [out, in] and b [out] are frozen
                └── α/r · A x [n, r] ── B ───┘                      A [r, in] and B [out, r] are trained

A is initialised uniformly in ±1/√in and B with zeros, so that new adapters do not change the model. The adapters of
experts are in `fira.nn.moe.experts`, and `fira.models.adapters` adds both to a model.
"""

import torch
from torch import Tensor, nn

from fira.nn.autocast import product_dtype
from fira.nn.lora import Lora


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
