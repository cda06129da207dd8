"""Linear layers of several experts with quantised weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fira.nn.moe.grouped_linear import RowGroups, empty_rows
from fira.nn.quantized_matrix import QuantizedMatrix


class QuantizedExperts(nn.Module):
    """In place of a weight [E, out, in] of an `ExpertBank`: the matrix of each expert."""

    def __init__(self, matrices: Sequence[QuantizedMatrix]) -> None:
        super().__init__()
        self.matrices = nn.ModuleList(matrices)
        self.out_features = matrices[0].out_features

    def forward(self, x: Tensor, groups: RowGroups, bias: Tensor | None) -> Tensor:
        """x [n, in], bias [E, out] → y [n, out], as `grouped_linear`."""
        y, rows, start = empty_rows(x, self.out_features), x.to(torch.bfloat16), 0
        for expert, size in groups.sizes.items():
            if not size:
                continue
            out = y[start : start + size]
            out.copy_(self.matrices[expert](rows[start : start + size]))
            if bias is not None:
                out += bias[expert]
            start += size
        y[start:] = 0
        return y
