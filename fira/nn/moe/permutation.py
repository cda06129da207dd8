"""Permutations of rows by expert, with backward passes that gather instead of scatter.

Shapes: N tokens, k experts per token, N·k assignments (token-major), E experts.

    order    [N·k]  assignment numbers sorted by expert (stable)
    inverse  [N·k]  the position of each assignment in that order
"""

from typing import Any

import torch
from torch import Tensor

from fira.nn.kernels.fused import use_fused


def sort_by_expert(experts: Tensor) -> tuple[Tensor, Tensor]:
    """Expert numbers [n] int64 → the stable `order` that sorts them, and its `inverse`."""
    order = experts.argsort(stable=True)
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def count_by_expert(experts: Tensor, num_experts: int, weights: Tensor | None = None) -> Tensor:
    """Expert numbers [n] → [E] int64, the count of each expert, or the sum of its weights [n] int64."""
    weights = torch.ones_like(experts) if weights is None else weights
    counts = weights.new_zeros(num_experts)  # not bincount, which would synchronise with the device
    return counts.scatter_add_(0, experts, weights)


def gather_rows(x: Tensor, order: Tensor, inverse: Tensor, copies: int = 1) -> Tensor:
    """x [n, …] with each row repeated `copies` times, permuted by `order` [n·copies]. Differentiable in x."""
    if len(x) == 1:
        return x.expand(copies, *x.shape[1:])
    if copies > 1 and use_fused(x):
        from fira.nn.kernels.expert_rows import GatherRows

        return GatherRows.apply(x, order, inverse, copies)
    if not torch.is_grad_enabled():
        return x.index_select(0, order // copies if copies > 1 else order)
    return _Gather.apply(x, order, inverse, copies)


def weighted_sum(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """rows [N·k, h] sorted by expert, weights [N, k] of each token's rows → [N, h]. Differentiable in both."""
    if use_fused(rows, weights):
        from fira.nn.kernels.expert_rows import WeightedSum

        return WeightedSum.apply(rows, weights, order, inverse)
    dtype = torch.promote_types(rows.dtype, weights.dtype)
    if not torch.is_grad_enabled():
        return _sum_rows(rows.to(dtype), inverse, weights.shape[1], weights.to(dtype).flatten())
    return _WeightedSum.apply(rows.to(dtype), weights.to(dtype), order, inverse)


def _sum_rows(rows: Tensor, positions: Tensor, copies: int, weights: Tensor | None = None) -> Tensor:
    """Row i of the result is Σ_j weights[i·copies + j] · rows[positions[i·copies + j]], in one kernel."""
    if copies == 1 and weights is None:
        return rows.index_select(0, positions)
    starts = torch.arange(0, len(positions), copies, device=positions.device)
    return torch.embedding_bag(rows, positions, starts, per_sample_weights=weights)[0]


class _Gather(torch.autograd.Function):
    """Rows x[order // copies]. With the inverse of `order` the backward is a gather as well, instead of a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return _sum_rows(grad, inverse, ctx.copies), None, None, None


class _WeightedSum(torch.autograd.Function):
    """Row i is Σ_j weights[i, j] · rows[inverse[i·k + j]], without storing the weighted rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order, inverse)
        return _sum_rows(rows, inverse, weights.shape[1], weights.flatten())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, order, inverse = ctx.saved_tensors
        grad_rows = grad.index_select(0, order // weights.shape[1])
        grad_weights = (grad_rows * rows).sum(1)[inverse].view_as(weights)
        return grad_rows.mul_(weights.flatten()[order][:, None]), grad_weights, None, None
