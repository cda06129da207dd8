"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), with the pairing of halves that Llama uses."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fira.nn.documents import Documents


class Stretch(NamedTuple):
    """Llama 3.1's frequency scaling for longer contexts.

    Frequencies with fewer than `low` turns in the `original` context length are divided by `factor`, those with more
    than `high` turns are unchanged, and those between are interpolated linearly.
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
    """Rotates each pair (x_i, x_{i + hd/2}) of a head by the angle position · θ^(−2i/hd).

    max_position: for longer sequences θ grows with the length T, θ' = θ · (s·T/max − (s − 1))^(hd / (hd − 2)), the
    "dynamic NTK" scaling of transformers; s is `factor`. None: θ is constant. stretch: see Stretch.
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
            raise ValueError(f"head_dim {head_dim} is odd; rotary embedding needs an even one")
        if head_dim == 2 and max_position is not None:
            raise ValueError(
                "head_dim 2: the base cannot grow with the length, because it does not occur in the angles"
            )
        if stretch is not None and stretch.low >= stretch.high:
            raise ValueError(f"rope_low {stretch.low} must be less than rope_high {stretch.high}")
        self.head_dim = head_dim
        self.theta = theta
        self.max_position = max_position
        self.factor = factor
        self.stretch = stretch
        self._cached: tuple[Tensor, Tensor] | None = None  # cos and sin of the first positions, if θ is constant

    @property
    def grows(self) -> bool:
        """Whether a token's angles depend on the length of the sequence, so that rotated keys cannot be cached."""
        return self.max_position is not None

    def __call__(
        self, length: int, *heads: Tensor, documents: Documents | None = None, starts: Tensor | None = None
    ) -> list[Tensor]:
        """heads [B, H, n, hd] at the last n of `length` positions → rotated: (a, b) ⊙ cos + (−b, a) ⊙ sin.

        documents: count positions, and lengths on which θ depends, in documents of n tokens in total.
        starts: [B] int64, count them from where each sequence starts; padding before it has position 0.
        """
        wide, first = torch.promote_types(heads[0].dtype, torch.float32), length - heads[0].shape[2]
        if documents is not None:
            cos, sin = self._cos_sin_at(documents.positions, documents.lengths, length, wide)
        elif starts is not None:
            columns = torch.arange(first, length, device=starts.device)
            positions = (columns - starts[:, None]).clamp(min=0)
            cos, sin = self._cos_sin_at(positions, length - starts[:, None], length, wide)
        else:
            cos, sin = self.cos_sin(length, wide, heads[0].device)
            cos, sin = cos[first:length], sin[first:length]
        half = self.head_dim // 2
        return [torch.addcmul(x * cos, x.roll(half, -1), sin).to(x.dtype) for x in heads]

    def cos_sin(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, cos) and (−sin, sin) [length or more, hd] of the angles of every position.

        Angles are computed in float64: in fp32 the error of the product grows in proportion to the position.
        """
        cached = None if self.grows else self._cached
        if cached is None or len(cached[0]) < length or cached[0].dtype != dtype or cached[0].device != device:
            count = length if self.grows else max(256, 2 * length)
            with torch.inference_mode(False):  # the cached tensors may be used for training later
                positions = torch.arange(count, dtype=torch.float64, device=device)
                cached = self._cached = self._compute(positions, self._theta(length), dtype)
        return cached

    def _cos_sin_at(
        self, positions: Tensor, lengths: Tensor, longest: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """`cos_sin` of each token [B, 1, T, hd] at positions [B, T] < longest; lengths [B, T] or [B, 1] determine θ."""
        if self.grows:
            cos, sin = self._compute(positions.double(), self._thetas(lengths)[..., None], dtype)
        else:
            cos, sin = (table[positions] for table in self.cos_sin(longest, dtype, positions.device))
        return cos[:, None], sin[:, None]

    def _compute(self, positions: Tensor, theta: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, cos) and (−sin, sin) […, hd] of the angles at positions […] float64; theta: a number, or […, 1]."""
        halves = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=positions.device) / self.head_dim
        frequencies = theta**-halves
        angles = positions[..., None] * (self.stretch(frequencies) if self.stretch else frequencies)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def _theta(self, length: int) -> float:
        if self.max_position is None or length <= self.max_position:
            return self.theta
        growth = self.factor * length / self.max_position - (self.factor - 1)
        return self.theta * growth ** (self.head_dim / (self.head_dim - 2))

    def _thetas(self, lengths: Tensor) -> Tensor:
        """`_theta` of each length, without reading a value of the device."""
        assert self.max_position is not None
        growth = self.factor * lengths.double() / self.max_position - (self.factor - 1)
        return self.theta * growth.clamp(min=1) ** (self.head_dim / (self.head_dim - 2))
