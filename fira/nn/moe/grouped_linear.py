"""Several linear layers at once: rows that stand in groups, each group with a weight of its own."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RowGroups:
    """Consecutive groups of rows, each of which belongs to another weight.

    counts: [E] int64, the rows of each, group e being weight e's. sizes: the same on the host, where known; the rows of
    weights in any order. ragged: behind the last group may stand rows that belong to none.
    """

    def __init__(self, counts: Tensor | None, sizes: dict[int, int] | None = None, ragged: bool = False) -> None:
        self.counts = counts
        self.ragged = ragged
        if sizes is not None:
            self.sizes = sizes

    @cached_property
    def sizes(self) -> dict[int, int]:
        """The rows of each weight in the order of the groups, on the host; waits for the device they are on."""
        assert self.counts is not None
        return dict(enumerate(self.counts.tolist()))

    @cached_property
    def ends(self) -> Tensor:
        """[E] int32, where each group ends."""
        assert self.counts is not None
        return self.counts.cumsum(0, dtype=torch.int32)


def grouped_linear(x: Tensor, groups: RowGroups, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each row of group e times weight[e] plus bias[e]: x [N, in], weight [E, out, in], bias [E, out] → [N, out].

    A group may be empty; its weight then has a gradient of zero. Rows of no group are zero in y. On CUDA in bf16 this
    is one kernel that reads the sizes where they are. Elsewhere it is a product per group that writes into the whole,
    in the backward as well: nothing is cut out, concatenated or stacked. On a CPU that is as fast as torch's
    grouped_mm, or faster.
    """
    if torch.is_autocast_enabled(x.device.type):  # which does not see into a Function
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.is_cuda and x.dtype == torch.bfloat16:
        return _one_kernel(x, groups, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias, groups.sizes)
    y = _OfRows.apply(x, weight.detach(), None if bias is None else bias.detach(), groups.sizes)
    return _Join.apply(y, _OfWeights.apply(weight, bias, x.detach(), groups.sizes))


def _one_kernel(x: Tensor, groups: RowGroups, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same without a look at the sizes from the host."""
    group = torch.searchsorted(groups.ends, torch.arange(len(x), device=x.device), right=True)
    inside = (group < len(weight))[:, None]
    if groups.ragged:  # what the kernel leaves there must reach neither y nor the gradient of x
        x = x.where(inside, 0)
    y = F.grouped_mm(x, weight.transpose(1, 2), offs=groups.ends)
    if bias is not None:
        y = y + bias[group.clamp(max=len(weight) - 1)]
    return y.where(inside, 0) if groups.ragged else y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: dict[int, int]) -> Tensor:
    y = x.new_empty(len(x), weight.shape[1])
    parts = _parts(sizes, len(x))
    for e, rows, out in zip(sizes, x.split(parts), y.split(parts), strict=False):
        if not len(rows):
            continue
        if bias is None:
            torch.mm(rows, weight[e].T, out=out)
        else:
            torch.addmm(bias[e], rows, weight[e].T, out=out)
    if parts[-1]:
        y[-parts[-1] :] = 0
    return y


def _parts(sizes: dict[int, int], rows: int) -> list[int]:
    """The groups' sizes, and how many rows are left."""
    return [*sizes.values(), rows - sum(sizes.values())]


class _OfRows(torch.autograd.Function):
    """The product as a function of the rows alone.

    That of the weights is a node of its own, so that autograd can be asked for either gradient without the other, as a
    backward in two halves does; of a Function it always computes all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: dict[int, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.sizes = sizes
        return _product(x, weight, bias, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(grad, weight.transpose(1, 2), None, ctx.sizes), None, None, None


class _OfWeights(torch.autograd.Function):
    """Stands for the product as a function of the weights: the gradient that comes to it is that of the product."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor, sizes: dict[int, int]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sizes, ctx.shape, ctx.biased = sizes, weight.shape, bias is not None
        return weight.new_empty(()).expand(len(x), weight.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        new = grad.new_empty if len(ctx.sizes) == ctx.shape[0] else grad.new_zeros  # weights that no group names
        of_weight = new(ctx.shape)
        of_bias = new(ctx.shape[:2]) if ctx.biased else None
        parts = _parts(ctx.sizes, len(x))
        for e, rows, ins in zip(ctx.sizes, grad.split(parts), x.split(parts), strict=False):
            torch.mm(rows.T, ins, out=of_weight[e])
            if of_bias is not None:
                torch.sum(rows, 0, out=of_bias[e])
        return of_weight, of_bias, None, None


class _Join(torch.autograd.Function):
    """y, which both of its functions share: each is given its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, stand_in: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad
