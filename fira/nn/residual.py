"""Residual connections."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """x + y, or λ x + y with a learnt scalar λ, initially 1.

    Between layers that normalise their input, the scalars determine the share of each branch in the stream. Another
    scalar for y would only change the scale of the stream, which has no effect there.
    """

    def __init__(self, learnt: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1)) if learnt else None

    def init_parameter(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        value.fill_(1.0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, the stream, and y, the output of a branch, [B, T, d] → [B, T, d]."""
        return (x if self.scale is None else self.scale * x) + y
