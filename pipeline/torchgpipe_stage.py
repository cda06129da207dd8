"""A stage split once more over this process's own devices, by torchgpipe (Kim et al. 2020, arXiv 2004.09910)."""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torchgpipe import GPipe, is_checkpointing, is_recomputing

from pipeline.stage import Autocast


class SplitContext(Protocol):
    """What a context must be able to do to follow a micro-batch through torchgpipe."""

    def split(self, sizes: list[int]) -> list[Self]: ...

    def to(self, device: torch.device) -> Self: ...


class _Link(nn.Module):
    """A layer as torchgpipe calls it: one argument. The contexts of the chunks are laid ready before each forward.

    torchgpipe runs the chunks of a micro-batch in ascending order and recomputes them in descending order;
    micro-batches go backwards in the order in which they came, as all schedules have it.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.coming: list[Any] = []
        self.kept: deque[list[Any]] = deque()  # per micro-batch in flight, what its chunks will be recomputed with

    def forward(self, x: Tensor) -> Tensor:
        if is_recomputing():
            context = self.kept[0].pop()
            if not self.kept[0]:
                self.kept.popleft()
        else:
            context = self.coming.pop(0)
            if is_checkpointing():
                self.kept[-1].append(context)
        return self.layer(x, None if context is None else context.to(x.device))


class LocalPipeline(nn.Module):
    """Called as `module(x, context)`, like the layers it holds.

    layers: as the model has them; balance: how many of them each device holds; chunks: parts that a micro-batch is cut
    into. With recompute only partition boundaries are kept.
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
        self.links = [_Link(Autocast(layer, autocast)) for layer in layers]
        self.recompute = recompute
        self.splits = False  # torchgpipe hides the graph
        self.gpipe = GPipe(
            nn.Sequential(*self.links),
            balance=list(balance),
            devices=list(devices),
            chunks=chunks or 4 * len(devices),  # GPipe's paper: with four chunks a partition the bubble is negligible
            checkpoint="always" if recompute else "never",
        )

    def forward(self, x: Tensor, context: SplitContext | None = None) -> Tensor:
        sizes = [len(chunk) for chunk in x.chunk(self.gpipe.chunks)]
        contexts: list[Any] = [None] * len(sizes) if context is None else context.split(sizes)
        self.gpipe.train(torch.is_grad_enabled())  # torchgpipe checkpoints in train mode only
        for link in self.links:
            link.coming = list(contexts)
            if self.recompute and torch.is_grad_enabled():
                link.kept.append([])
        return self.gpipe(x)
