"""Toy layers with a context, their micro-batches, and plain autograd as the reference."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.engine import MicroBatch

WIDTH, LAYERS, ROWS, MICROBATCHES = 6, 6, 4, 5
CPU = torch.device("cpu")


@dataclass
class ToyContext:
    """A factor and a target for each row, so that a wrong context or a wrong row changes the result."""

    factors: Tensor
    targets: Tensor

    def split(self, sizes: list[int]) -> list[Self]:
        parts = zip(self.factors.split(sizes), self.targets.split(sizes), strict=True)
        return [type(self)(factors, targets) for factors, targets in parts]

    def to(self, device: torch.device) -> Self:
        return self


class ToyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: ToyContext) -> Tensor:
        return torch.tanh(self.linear(x)) * context.factors[:, None]


def objective(output: Tensor, context: Any) -> tuple[Tensor, Tensor]:
    loss = (output - context.targets).square().sum()
    return 2 * loss, loss


def make(dtype: torch.dtype = torch.float32) -> tuple[list[ToyLayer], list[MicroBatch]]:
    torch.manual_seed(1)
    layers = [ToyLayer().to(dtype) for _ in range(LAYERS)]
    batches = []
    for _ in range(MICROBATCHES):
        x, y, factors = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH), torch.rand(ROWS) + 0.5
        batches.append(MicroBatch(x.to(dtype), x.shape, ToyContext(factors.to(dtype), y.to(dtype))))
    return layers, batches


def reference(layers: list[ToyLayer], batches: list[MicroBatch]) -> tuple[list[float], list[Tensor]]:
    """Return the losses by micro-batch and the gradients of all parameters, computed by plain autograd."""
    losses = []
    for batch in batches:
        x = batch.inputs
        for layer in layers:
            x = layer(x, batch.context)
        loss, report = objective(x, batch.context)
        loss.backward()
        losses.append(report.item())
    return losses, take_gradients(layers)


def take_gradients(layers: list[ToyLayer]) -> list[Tensor]:
    gradients = [p.grad for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.zero_grad()
    assert all(gradient is not None for gradient in gradients)
    return gradients  # type: ignore[return-value]
