"""The feed-forward layer of a dense block."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fira.nn.kernels.fused import use_fused


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, a: Tensor | None = None) -> Tensor:
    """activation(gate) ⊙ a, elementwise. Without a, the last dimension of `gate` is that of the gate followed by a."""
    if use_fused(gate) and activation in (F.silu, F.gelu):
        from fira.nn.kernels.gated_activation import Gated

        return Gated.apply(gate, a, activation is F.silu)
    if a is None:
        gate, a = gate.chunk(2, dim=-1)
    return activation(gate) * a


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)² (So et al. 2021, arXiv 2109.08668)."""
    return x.relu().square()


class GatedMLP(nn.Module):
    """W2 (activation(W1 x) ⊙ W3 x), without biases (Shazeer 2020, arXiv 2002.05202).

    linear: constructor of W1, W2 and W3.
    """

    lora_target = "experts"  # in whose place it is

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        linear: Callable[..., nn.Linear],
        activation: Callable[[Tensor], Tensor] = F.silu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.w1, self.w3 = (linear(d_model, d_ff, bias=False) for _ in range(2))
        self.w2 = linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[…, d] → […, d]."""
        return self.w2(gated(self.activation, self.w1(x), self.w3(x)))
