"""Linear layer for decoding, whose product with one row reads the weight at the speed of the memory.

torch computes the product of one row with MKL's matrix-vector product, which on AMD CPUs runs at half of the memory
bandwidth. MKL's batched product does not, so the weight is given to it as a batch of two halves.
"""

import torch
from torch import Tensor, nn


class RowLinear(nn.Linear):
    """A linear layer without bias. It takes over the weight of `base`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, False, base.weight.device, base.weight.dtype)
        self.weight = base.weight

    def reset_parameters(self) -> None:
        """No-op: the weight is that of the base."""

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        if x.numel() > self.in_features or x.dtype != torch.float32:
            return super().forward(x)
        half = self.out_features // 2
        y = torch.bmm(self.weight[: 2 * half].unflatten(0, (2, half)), x.view(1, -1).T.expand(2, -1, 1)).flatten()
        if self.out_features % 2:
            y = torch.cat([y, self.weight[-1:] @ x.flatten()])
        return y.view(*x.shape[:-1], self.out_features)
