"""The engine and the local pipeline on one rank, against plain autograd."""

import itertools
from dataclasses import dataclass
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from pipeline.engine import Engine, MicroBatch
from pipeline.schedule import Action, Kind, Schedule, forward_only
from pipeline.stage import DeviceLayers, Stage
from pipeline.torchgpipe_stage import LocalPipeline

WIDTH, LAYERS, ROWS, MICROBATCHES = 6, 5, 4, 3


@dataclass
class Scale:
    """A context that layers must be given with the right rows: each row's factor."""

    factors: Tensor

    def split(self, sizes: list[int]) -> list[Self]:
        return [type(self)(factors) for factors in self.factors.split(sizes)]

    def to(self, device: torch.device) -> Self:
        return self


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Scale) -> Tensor:
        return torch.tanh(self.linear(x)) * context.factors[:, None]


def squares(output: Tensor, targets: Tensor, context: Any) -> tuple[Tensor, Tensor]:
    loss = (output - targets).square().sum()
    return loss, loss


def make(dtype: torch.dtype = torch.float64) -> tuple[list[Layer], list[MicroBatch]]:
    torch.manual_seed(1)
    layers = [Layer().to(dtype) for _ in range(LAYERS)]
    batches = []
    for _ in range(MICROBATCHES):
        x, y, factors = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH), torch.rand(ROWS) + 0.5
        batches.append(MicroBatch(x.to(dtype), y.to(dtype), x.shape, Scale(factors.to(dtype))))
    return layers, batches


def plain(layers: list[Layer], batches: list[MicroBatch]) -> tuple[list[float], list[Tensor]]:
    losses = []
    for batch in batches:
        x = batch.inputs
        for layer in layers:
            x = layer(x, batch.context)
        loss, _ = squares(x, batch.targets, None)
        loss.backward()
        losses.append(loss.item())
    return losses, take_gradients(layers)


def take_gradients(layers: list[Layer]) -> list[Tensor]:
    gradients = [p.grad for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.zero_grad()
    assert all(g is not None for g in gradients)
    return gradients  # type: ignore[return-value]


def on_one_rank(stages: int) -> Schedule:
    """A schedule whose stages are all on rank 0, with all forwards before the backwards."""
    forwards = [Action(Kind.FORWARD, s, i) for i in range(MICROBATCHES) for s in range(stages)]
    backwards = [Action(Kind.BACKWARD, s, i) for i in range(MICROBATCHES) for s in reversed(range(stages))]
    return Schedule("one rank", MICROBATCHES, (0,) * stages, (tuple(forwards + backwards),))


def zero_bubble_on_one_rank(stages: int) -> Schedule:
    """The same with the gradients of weights after everything else."""
    before = on_one_rank(stages).actions[0]
    halves = [a if a.kind is Kind.FORWARD else a._replace(kind=Kind.INPUT) for a in before]
    weights = [Action(Kind.WEIGHT, s, i) for s in range(stages) for i in range(MICROBATCHES)]
    return Schedule("one rank", MICROBATCHES, (0,) * stages, (tuple(halves + weights),))


@pytest.mark.parametrize("schedule", [on_one_rank, zero_bubble_on_one_rank])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 5])
def test_engine_gives_the_bits_of_plain_autograd(stages, recompute, schedule):
    layers, batches = make(torch.float32)
    losses, gradients = plain(layers, batches)
    cuts = [round(s * LAYERS / stages) for s in range(stages + 1)]
    modules = [DeviceLayers(layers[a:b], recompute=recompute) for a, b in itertools.pairwise(cuts)]
    engine = Engine({s: Stage(m, torch.device("cpu")) for s, m in enumerate(modules)}, squares)
    reports = engine.run(schedule(stages), batches)
    assert [float(report) for report in reports] == losses
    assert all(torch.equal(a, b) for a, b in zip(take_gradients(layers), gradients, strict=True))


def test_evaluation_leaves_no_gradient():
    layers, batches = make()
    losses, _ = plain(layers, batches)
    engine = Engine({0: Stage(DeviceLayers(layers), torch.device("cpu"))}, squares)
    reports = engine.run(forward_only((0,), MICROBATCHES), batches)
    assert [float(report) for report in reports] == losses
    assert all(p.grad is None for layer in layers for p in layer.parameters())


def test_engine_counts_microbatches():
    layers, batches = make()
    engine = Engine({0: Stage(DeviceLayers(layers), torch.device("cpu"))}, squares)
    with pytest.raises(ValueError, match="3 micro-batches, not 2"):
        engine.run(on_one_rank(1), batches[:2])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_torchgpipe_follows_each_row_with_its_context(devices, chunks, recompute):
    """All micro-batches are in flight at once, so recomputation must find the context of the right one."""
    layers, batches = make()
    losses, gradients = plain(layers, batches)
    balance = [2, 3] if devices == 2 else [1, 1, 1, 2]
    module = LocalPipeline(layers, balance, ["cpu"] * devices, chunks=chunks, recompute=recompute)
    engine = Engine({0: Stage(module, torch.device("cpu"))}, squares)
    reports = engine.run(on_one_rank(1), batches)
    assert [float(report) for report in reports] == pytest.approx(losses, rel=1e-13)
    torch.testing.assert_close(take_gradients(layers), gradients, rtol=1e-12, atol=1e-12)
    assert len(engine.run(forward_only((0,), MICROBATCHES), batches)) == MICROBATCHES


def test_precision_reaches_torchgpipes_threads():
    seen = []

    class Probe(Layer):
        def forward(self, x: Tensor, context: Any) -> Tensor:
            y = self.linear(x)
            seen.append(y.dtype)
            return y.float()

    module = LocalPipeline([Probe() for _ in range(2)], [1, 1], ["cpu", "cpu"], chunks=2, autocast=torch.bfloat16)
    module(torch.randn(ROWS, WIDTH))
    assert seen == [torch.bfloat16] * 4
