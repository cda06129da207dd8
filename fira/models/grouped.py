"""Several linear layers at once: rows that stand in groups, each group with a weight of its own."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Groups:
    """Consecutive groups of rows. counts: [E] int64, the rows of each. sizes: the same on the host, where known."""

    def __init__(self, counts: Tensor, sizes: list[int] | None = None) -> None:
        self.counts = counts
        if sizes is not None:
            self.sizes = sizes

    @cached_property
    def sizes(self) -> list[int]:
        """The counts on the host, which waits for the device they are on."""
        return self.counts.tolist()

    @cached_property
    def ends(self) -> Tensor:
        """[E] int32, where each group ends."""
        return self.counts.cumsum(0, dtype=torch.int32)


def grouped_linear(x: Tensor, groups: Groups, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each row of group e times weight[e] plus bias[e]: x [N, in], weight [E, out, in], bias [E, out] → [N, out].

    A group may be empty; its weight then has a gradient of zero. On CUDA in bf16 this is one kernel that reads the
    sizes where they are. Elsewhere it is a product per group that writes into the whole, in the backward as well:
    nothing is cut out, concatenated or stacked. On a CPU that is as fast as torch's grouped_mm, or faster.
    """
    if torch.is_autocast_enabled(x.device.type):  # which does not see into a Function
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.is_cuda and x.dtype == torch.bfloat16:
        y = F.grouped_mm(x, weight.transpose(1, 2), offs=groups.ends)
        return y if bias is None else y + bias.repeat_interleave(groups.counts, 0, output_size=len(x))
    if not torch.is_grad_enabled():
        return _product(x, weight, bias, groups.sizes)
    y = _OfRows.apply(x, weight.detach(), None if bias is None else bias.detach(), groups.sizes)
    return _Join.apply(y, _OfWeights.apply(weight, bias, x.detach(), groups.sizes))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
    y = x.new_empty(len(x), weight.shape[1])
    start = 0
    for e, size in enumerate(sizes):
        if size:
            rows, out = x[start : start + size], y[start : start + size]
            if bias is None:
                torch.mm(rows, weight[e].T, out=out)
            else:
                torch.addmm(bias[e], rows, weight[e].T, out=out)
            start += size
    return y


class _OfRows(torch.autograd.Function):
    """The product as a function of the rows alone.

    That of the weights is a node of its own, so that autograd can be asked for either gradient without the other, as a
    backward in two halves does; of a Function it always computes all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
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
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sizes, ctx.shape, ctx.biased = sizes, weight.shape, bias is not None
        return weight.new_empty(()).expand(len(x), weight.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        of_weight = grad.new_empty(ctx.shape)
        of_bias = grad.new_empty(ctx.shape[:2]) if ctx.biased else None
        for e, (rows, ins) in enumerate(zip(grad.split(ctx.sizes), x.split(ctx.sizes), strict=True)):
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
