"""A stage pipelined over the devices of one process by torchgpipe (Kim et al. 2020, arXiv 2004.09910).

torchgpipe splits a micro-batch into chunks and calls every layer with one argument. Before the forward, each layer
therefore gets a queue with one context per chunk. The whole context is moved to each device once and then split,
because a copy from one GPU to another is a barrier between the streams of the two:

    context ──► [0] moved to the layer's device ──► contexts of the chunks

    contexts of the chunks ──► [1] pending ──► forward of chunk 0, 1, …             ──► [2] for_recompute
    [2] for_recompute ───────────────────────► recomputation of chunk …, 1, 0  [3]
"""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torchgpipe import GPipe, is_checkpointing, is_recomputing

from pipeline.stage import Autocast


class SplitContext(Protocol):
    """A context that can be moved to the device of a layer and split like its micro-batch."""

    def to(self, device: torch.device) -> Self: ...

    def split(self, sizes: list[int]) -> list[Self]: ...


class _QueuedContextLayer(nn.Module):
    """A layer with the single-argument call that torchgpipe expects; its contexts come from the queues.

    torchgpipe runs the chunks of a micro-batch in ascending order and recomputes them in descending order, and all
    schedules run the backwards of a stage in the order of the forwards.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.pending: list[Any] = []
        self.for_recompute: deque[list[Any]] = deque()  # one list of contexts per micro-batch in flight

    def forward(self, x: Tensor) -> Tensor:
        if is_recomputing():
            context = self.for_recompute[0].pop()  # [3]
            if not self.for_recompute[0]:
                self.for_recompute.popleft()
        else:
            context = self.pending.pop(0)
            if is_checkpointing():
                self.for_recompute[-1].append(context)  # [2]
        return self.layer(x, context)


class LocalPipeline(nn.Module):
    """Layers over several local devices, called as `module(x, context)` like a single layer.

    balance: the number of layers on each device. chunks: the number of parts that a micro-batch is split into (default:
    four per device, with which the bubble is negligible according to the GPipe paper, arXiv 1811.06965, §2.3).
    recompute: keep only the inputs of each device's layers, and recompute the rest in the backward.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        balance: Sequence[int],
        devices: Sequence[torch.device | str],
        chunks: int | None = None,
        autocast: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        queued = [_QueuedContextLayer(Autocast(layer, autocast)) for layer in layers]
        self.layers_by_device = [
            queued[end - count : end] for count, end in zip(balance, accumulate(balance), strict=True)
        ]
        self.recompute = recompute
        self.splits_backward = False  # torchgpipe hides the autograd graph
        self.gpipe = GPipe(
            nn.Sequential(*queued),
            balance=list(balance),
            devices=list(devices),
            chunks=chunks or 4 * len(devices),
            checkpoint="always" if recompute else "never",
        )

    def forward(self, x: Tensor, context: SplitContext | None = None) -> Tensor:
        sizes = [len(chunk) for chunk in x.chunk(self.gpipe.chunks)]
        self.gpipe.train(torch.is_grad_enabled())  # torchgpipe recomputes in train mode only
        for device, layers in zip(self.gpipe.devices, self.layers_by_device, strict=True):
            contexts = [None] * len(sizes) if context is None else context.to(device).split(sizes)  # [0]
            for layer in layers:
                layer.pending = list(contexts)  # [1]
                if self.recompute and torch.is_grad_enabled():
                    layer.for_recompute.append([])
        return self.gpipe(x)
