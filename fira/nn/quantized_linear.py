"""Linear layers with a quantised weight."""

import torch
from torch import Tensor, nn

from fira.nn.quantized_matrix import Int8Matrix, QuantizedMatrix


class QuantizedLinear(nn.Module):
    """W x + b. It takes over the bias of `base`, whose weight is `matrix`."""

    def __init__(self, base: nn.Linear, matrix: QuantizedMatrix) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.matrix = matrix
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        y = self.matrix(rows).to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class QuantizedHead(QuantizedLinear):
    """A projection to logits in 8 bits."""

    matrix: Int8Matrix

    @property
    def weight(self) -> Tensor:
        """W in fp32, computed in each call, for losses that do not compute all logits at once."""
        return self.matrix.dequantized()
