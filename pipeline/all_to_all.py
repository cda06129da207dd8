"""The differentiable all-to-all. Its backward is the same call with the sizes swapped."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of x, `send[r]` of them for rank r in order, become rows from every rank, `receive[r]` from rank r.

    x: [sum(send), …] → [sum(receive), …]. Sizes may be zero. Every rank of the group must call it, also in backward.
    """
    return _AllToAll.apply(x, send, receive, group)
