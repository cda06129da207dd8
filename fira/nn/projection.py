"""The projection of hidden vectors to logits, as the loss functions take it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Projection(NamedTuple):
    """logits = softcapped(x weightᵀ), for hidden vectors x [N, d] and a weight [V, d].

    cast_weight: the weight in the dtype of products under autocast; None: it is cast in each call. It may be preceded
    by other columns [V, d − c], for which no gradient is computed; `weight` is then [V, c].
    softcap: see `softcapped`.
    """

    weight: Tensor
    cast_weight: Tensor | None = None
    softcap: float = 0.0

    def factor(self, dtype: torch.dtype) -> Tensor:
        """The factor of x [V, d] in the dtype of products, without a graph."""
        return self.weight.detach().to(dtype) if self.cast_weight is None else self.cast_weight


def softcapped(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap), which is in (−cap, cap) (Gemma 2, arXiv 2408.00118); a cap of 0 changes nothing."""
    return cap * (logits / cap).tanh() if cap else logits
