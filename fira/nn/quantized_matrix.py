"""Matrices whose elements are stored in 8 or 4 bits, and their products on a CPU.

Shapes: n rows, groups of G consecutive inputs.

    x [n, in] bf16 ──→ y = x Wᵀ [n, out] bf16, summed in fp32

    int8   W[o, i] ≈ q[o, i] · scale[o]                                  q = −127 … 127
    int4   W[o, i] ≈ (q[o, i] − 8) · scale[o, i / G] + middle[o, i / G]    q = 0 … 15

Values are rounded to the nearest q. scale and middle are rounded to bf16 first, so that their rounding is no additional
error. The products are kernels of torch, in which a row of y does not depend on the other rows. They need multiples of
G inputs and of PADDING outputs; other sizes are padded with zeros.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32  # G
PADDING = 16
ROWS = 1024  # rows that are quantised at a time, so that a large head needs little memory


class QuantizedMatrix(nn.Module, ABC):
    """A matrix W [out, in], made from its values. The buffers are not part of the state dict: they are not saved."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._missing = -self.in_features % GROUP
        missing_outputs, weight = -self.out_features % PADDING, weight.detach().float()
        if self._missing or missing_outputs:
            weight = F.pad(weight, (0, self._missing, 0, missing_outputs))
        for name, value in self.quantize(weight).items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, in] bf16 → [n, out] bf16."""
        y = self.product(F.pad(x, (0, self._missing)) if self._missing else x.contiguous())
        return y[:, : self.out_features]

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Buffers for a padded matrix in fp32."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Product with padded rows and outputs."""


class Int8Matrix(QuantizedMatrix):
    """8 bits per element and one scale per output."""

    q: Tensor  # [out, in] int8
    scale: Tensor  # [out] bf16

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        scale = (torch.linalg.vector_norm(weight, torch.inf, 1) / 127).to(torch.bfloat16)
        q = torch.empty_like(weight, dtype=torch.int8)
        blocks = (tensor.split(ROWS) for tensor in (q, weight, _divisor(scale)[:, None]))
        for target, block, divisor in zip(*blocks, strict=True):
            target.copy_((block / divisor).round_().clamp_(-127, 127))
        return {"q": q, "scale": scale}

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, self.q, self.scale)

    def dequantized(self) -> Tensor:
        """W [out, in] in fp32."""
        return (self.q * self.scale.float()[:, None])[: self.out_features, : self.in_features]


class Int4Matrix(QuantizedMatrix):
    """4 bits per element, and for each output and group a scale and the value of q = 8."""

    q: Tensor  # the elements in the order of the kernel, two in a byte
    scale_and_middle: Tensor  # [in / G, out, 2] bf16

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        groups = weight.unflatten(1, (-1, GROUP))
        low, high = groups.amin(2), groups.amax(2)
        scale = ((high - low) / 15).to(torch.bfloat16)
        middle = (low + 8 * scale.float()).to(torch.bfloat16)
        q = ((groups - middle.float()[..., None]) / _divisor(scale)[..., None]).round_().add_(8).clamp_(0, 15)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.flatten(1).to(torch.int32), 1)
        return {"q": packed, "scale_and_middle": torch.stack([scale.T, middle.T], 2).contiguous()}

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.q, GROUP, self.scale_and_middle)


def _divisor(scale: Tensor) -> Tensor:
    """The scale in fp32, or one where it is zero because all values are equal."""
    return scale.float().where(scale > 0, 1)
