"""A stage over several local devices, by torchgpipe, compared with plain autograd."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from pipeline.engine import Engine
from pipeline.schedule import SCHEDULES, forward_only, gpipe
from pipeline.stage import Stage
from pipeline.torchgpipe_stage import LocalPipeline
from tests.pipeline.toy_layers import (
    CPU,
    MICROBATCHES,
    ROWS,
    WIDTH,
    ToyContext,
    ToyLayer,
    make,
    objective,
    reference,
    take_gradients,
)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_each_chunk_has_its_context(devices, chunks, recompute):
    """With all micro-batches in flight, recomputation must use the context of its own micro-batch."""
    layers, batches = make(torch.float64)
    losses, gradients = reference(layers, batches)
    balance = [2, 4] if devices == 2 else [1, 1, 1, 3]
    module = LocalPipeline(layers, balance, ["cpu"] * devices, chunks=chunks, recompute=recompute)
    engine = Engine({0: Stage(module, CPU)}, objective, dtype=torch.float64)
    reports = engine.run(gpipe(1, MICROBATCHES), batches)
    assert [float(report) for report in reports] == pytest.approx(losses, rel=1e-13)
    torch.testing.assert_close(take_gradients(layers), gradients, rtol=1e-12, atol=1e-12)
    assert len(engine.run(forward_only((0,), MICROBATCHES), batches)) == MICROBATCHES


@pytest.mark.parametrize("recompute", [False, True])
def test_context_is_moved_once_per_device(recompute):
    """Neither the number of layers nor that of chunks adds moves, and every layer gets its device's copy."""
    moves, used = [], []

    @dataclass
    class Counted(ToyContext):
        copy: int = -1  # number of the move that returned it

        def split(self, sizes: list[int]) -> list[Self]:
            return [replace(part, copy=self.copy) for part in super().split(sizes)]

        def to(self, device: torch.device) -> Self:
            moves.append(device)
            return replace(self, copy=len(moves) - 1)

    class Probe(ToyLayer):
        def forward(self, x: Tensor, context: Counted) -> Tensor:
            used.append((self.number, context.copy))
            return super().forward(x, context)

    layers = [Probe() for _ in range(4)]
    for number, layer in enumerate(layers):
        layer.number = number
    module = LocalPipeline(layers, [1, 3], ["cpu"] * 2, chunks=ROWS, recompute=recompute)
    context = Counted(torch.ones(ROWS), torch.zeros(ROWS, WIDTH))
    module(torch.randn(ROWS, WIDTH, requires_grad=True), context).sum().backward()
    assert moves == [CPU, CPU]
    assert Counter(used) == dict.fromkeys([(0, 0), (1, 1), (2, 1), (3, 1)], ROWS * (1 + recompute))


def test_schedule_that_splits_the_backward():
    layers, batches = make(torch.float64)
    _, gradients = reference(layers, batches)
    module = LocalPipeline(layers, [3, 3], ["cpu"] * 2)
    assert module.gpipe.chunks == 8
    Engine({0: Stage(module, CPU)}, objective).run(SCHEDULES["zb-h1"].builder(1, MICROBATCHES), batches)
    torch.testing.assert_close(take_gradients(layers), gradients, rtol=1e-12, atol=1e-12)


def test_autocast_in_torchgpipe_threads():
    dtypes = []

    class Probe(ToyLayer):
        def forward(self, x: Tensor, context: Any) -> Tensor:
            y = self.linear(x)
            dtypes.append(y.dtype)
            return y.float()

    module = LocalPipeline([Probe() for _ in range(2)], [1, 1], ["cpu", "cpu"], chunks=2, autocast=torch.bfloat16)
    module(torch.randn(ROWS, WIDTH))
    assert dtypes == [torch.bfloat16] * 4
