"""The feed-forward layer of a dense block."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """W2 (silu(W1 x) ⊙ W3 x), without biases (Shazeer 2020, arXiv 2002.05202). linear: constructor of W1, W2 and W3."""

    def __init__(self, d_model: int, d_ff: int, linear: Callable[..., nn.Linear]) -> None:
        super().__init__()
        self.w1, self.w3 = (linear(d_model, d_ff, bias=False) for _ in range(2))
        self.w2 = linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[…, d] → […, d]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
