"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in halves as Llama has it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Stretch(NamedTuple):
    """Llama 3.1's way to longer contexts: what makes few turns in the `original` context turns `factor` times slower.

    Few are fewer than `low`. What makes more than `high` turns stays as it was, and between them it is a blend.
    """

    factor: float
    low: float
    high: float
    original: int

    def __call__(self, frequencies: Tensor) -> Tensor:
        turns = self.original * frequencies / (2 * math.pi)
        fast = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequencies * (fast + (1 - fast) / self.factor)


class Rotary:
    """Turns each pair (x_i, x_{i + hd/2}) of a head by position · θ^(−2i/hd).

    max_position: from there on θ grows with the length T, θ' = θ · (s·T/max − (s − 1))^(hd / (hd − 2)), which is
    "dynamic NTK" scaling as transformers has it; s is `factor`. None: θ never changes. stretch: see Stretch.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        max_position: int | None = None,
        factor: float = 1.0,
        stretch: Stretch | None = None,
    ) -> None:
        if head_dim % 2:
            raise ValueError(f"rotary embedding turns pairs; head_dim {head_dim} is odd")
        self.head_dim = head_dim
        self.theta = theta
        self.max_position = max_position
        self.factor = factor
        self.stretch = stretch
        self._turns: tuple[Tensor, Tensor] | None = None  # of the first positions, where θ never changes

    @property
    def grows(self) -> bool:
        """Whether a token's angles depend on the length, so that it cannot be turned once and for all."""
        return self.max_position is not None

    def __call__(self, length: int, *heads: Tensor) -> list[Tensor]:
        """Each [B, H, n, hd], the last n of `length` positions → the same, turned: x ⊙ cos + (−b, a) ⊙ sin."""
        wide = torch.promote_types(heads[0].dtype, torch.float32)
        cos, sin = self._turns_up_to(length, wide, heads[0].device)
        first = length - heads[0].shape[2]
        cos, sin = cos[first:length], sin[first:length]
        half = self.head_dim // 2
        return [torch.addcmul(x * cos, x.roll(half, -1), sin).to(x.dtype) for x in heads]

    def _turns_up_to(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [length or more, hd] of every position's angles, each twice, the first time with −sin.

        Angles are computed in float64: in fp32 the product loses a digit for every factor of ten in the position.
        """
        known = None if self.grows else self._turns
        if known is None or len(known[0]) < length or known[0].dtype != dtype or known[0].device != device:
            count = length if self.grows else max(256, 2 * length)
            with torch.inference_mode(False):  # what is kept may be wanted for training later
                positions = torch.arange(count, dtype=torch.float64, device=device)
                halves = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / self.head_dim
                frequencies = self._theta(length) ** -halves
                angles = positions[:, None] * (self.stretch(frequencies) if self.stretch else frequencies)
                cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
                known = self._turns = torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)
        return known

    def _theta(self, length: int) -> float:
        if self.max_position is None or length <= self.max_position:
            return self.theta
        growth = self.factor * length / self.max_position - (self.factor - 1)
        return self.theta * growth ** (self.head_dim / (self.head_dim - 2))
