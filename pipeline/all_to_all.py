"""Differentiable, asynchronous all-to-all of rows. The gradient takes the reverse route: the sizes are swapped.

    forward    x ─────────→ [start] ── x ──────────────────────→ [wait] ─→ y
    backward   grad_x ←──── [start] ←─ grad_x, in progress ───── [wait] ←─ grad_y

[start] begins the exchange of x, and [wait] returns its result. In the backward, [wait] begins the exchange of grad_y,
and [start] waits for its result. Autograd runs the operations of the forward in reverse order, so that the operations
between [start] and [wait] overlap with the exchange in the forward, and their gradients in the backward.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class AllToAll:
    """One exchange: the first `send_sizes[0]` rows go to rank 0 of the group, the next `send_sizes[1]` to rank 1, etc.

    x [sum(send_sizes), …] → y [sum(receive_sizes), …], with `receive_sizes[r]` rows from rank r, in order of ranks.
    Sizes may be zero. Collective over the group, in the forward and in the backward: all ranks start their exchanges in
    the same order.
    """

    of_gradient: "AllToAll"  # the reverse exchange, which the backward starts

    def __init__(self, send_sizes: list[int], receive_sizes: list[int], group: dist.ProcessGroup) -> None:
        self.send_sizes, self.receive_sizes, self.group = send_sizes, receive_sizes, group
        self._in_progress: tuple[Tensor, dist.Work] | None = None

    def start(self, x: Tensor) -> Tensor:
        """Start the exchange; return x, for `wait` only."""
        return _Start.apply(x, self)

    def wait(self, x: Tensor) -> Tensor:
        """Return y, for the x that `start` returned. On a GPU, the current stream waits, not the host."""
        return _Wait.apply(x, self)

    def begin(self, x: Tensor) -> Tensor:
        """Start the exchange without autograd; return its result, which may be used after `end`."""
        result = x.new_empty(sum(self.receive_sizes), *x.shape[1:])
        sizes = self.receive_sizes, self.send_sizes
        work = dist.all_to_all_single(result, x.contiguous(), *sizes, group=self.group, async_op=True)
        self._in_progress = result, work
        return result

    def end(self) -> Tensor:
        """Wait for the exchange that `begin` started, and return its result."""
        assert self._in_progress is not None
        result, work = self._in_progress
        self._in_progress = None
        work.wait()
        return result


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        exchange.begin(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.of_gradient.end(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.end()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.of_gradient = AllToAll(exchange.receive_sizes, exchange.send_sizes, exchange.group)
        return exchange.of_gradient.begin(grad_y), None
