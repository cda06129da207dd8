"""Differentiable all-to-all of rows. The gradient takes the reverse route: all-to-all with the sizes swapped."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send_sizes: list[int], receive_sizes: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send_sizes, ctx.receive_sizes, ctx.group = send_sizes, receive_sizes, group
        out = x.new_empty(sum(receive_sizes), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive_sizes, send_sizes, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad_out, ctx.receive_sizes, ctx.send_sizes, ctx.group), None, None, None


def all_to_all(x: Tensor, send_sizes: list[int], receive_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first `send_sizes[0]` rows of x to rank 0 of the group, the next `send_sizes[1]` to rank 1, and so on.

    x: [sum(send_sizes), …] → [sum(receive_sizes), …], with `receive_sizes[r]` rows from rank r, in order of ranks.
    Sizes may be zero. Collective over the group, in the forward and in the backward.
    """
    return _AllToAll.apply(x, send_sizes, receive_sizes, group)
