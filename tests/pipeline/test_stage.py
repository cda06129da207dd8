"""A stage: forwards and full or split backwards of several micro-batches, with mixed segments and recomputation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.stage import Autocast, DeviceLayers, Stage
from tests.pipeline.toy_layers import (
    CPU,
    LAYERS,
    WIDTH,
    ToyContext,
    ToyLayer,
    make,
    objective,
    reference,
    take_gradients,
)


class Counting(ToyLayer):
    """Counts its forwards."""

    calls = 0

    def forward(self, x: Tensor, context: ToyContext) -> Tensor:
        self.calls += 1
        return super().forward(x, context)


def make_stage(layers: list[ToyLayer], recomputed: int) -> Stage:
    """A stage that recomputes its first layers."""
    if recomputed in (0, LAYERS):
        return Stage(DeviceLayers(layers, recompute=recomputed > 0), CPU)
    before = DeviceLayers(layers[:recomputed], recompute=True)
    return Stage(DeviceLayers(layers[recomputed:]), CPU, [before])


@pytest.mark.parametrize("split", [False, True])
def test_each_use_of_a_segment_is_surrounded(split: bool) -> None:
    layers, (batch, *_) = make()
    uses = []

    @contextmanager
    def around(segment: int) -> Iterator[None]:
        before = layers[segment].linear.weight.grad
        yield
        uses.append((segment, before is None and layers[segment].linear.weight.grad is not None))

    segments = [DeviceLayers([layer], recompute=i == 0) for i, layer in enumerate(layers)]
    stage = Stage(segments[-1], CPU, segments[:-1], around)
    y = stage.forward(0, batch.inputs, batch.context)
    assert uses == [(i, False) for i in range(LAYERS)]
    uses.clear()
    (stage.backward_input if split else stage.backward)(0, torch.ones_like(y))
    assert uses == [(i, not split or i == 0) for i in reversed(range(LAYERS))]
    uses.clear()
    if split:
        stage.backward_weight(0)
        assert uses == [(i, True) for i in reversed(range(1, LAYERS))]


@pytest.mark.parametrize("recomputed", [0, 2, LAYERS])
@pytest.mark.parametrize("split", [False, True])
def test_backward_with_all_microbatches_in_flight(recomputed, split):
    layers, batches = make()
    losses, gradients = reference(layers, batches)
    stage = make_stage(layers, recomputed)
    grad_outputs, grad_inputs, reports = [], [], []
    for i, batch in enumerate(batches):
        y = stage.forward(i, batch.inputs, batch.context)
        loss, report = objective(y, batch.context)
        reports.append(report.item())
        grad_outputs += torch.autograd.grad(loss, y)
    for i, grad_output in enumerate(grad_outputs):
        grad_inputs.append((stage.backward_input if split else stage.backward)(i, grad_output))
    if split:
        early = [layers[-1].linear.weight.grad is None, layers[0].linear.weight.grad is None]
        assert early == [recomputed < LAYERS, recomputed == 0]
        for i in range(len(batches)):
            stage.backward_weight(i)
    assert reports == losses
    assert all(torch.equal(a, b) for a, b in zip(take_gradients(layers), gradients, strict=True))
    for batch, grad_input in zip(batches, grad_inputs, strict=True):
        x = batch.inputs.clone().requires_grad_()
        y = x
        for layer in layers:
            y = layer(y, batch.context)
        assert torch.equal(grad_input, torch.autograd.grad(objective(y, batch.context)[0], x)[0])
    assert not stage._saved
    assert not stage._weight_backwards


def test_recomputed_layers_run_twice():
    torch.manual_seed(0)
    layers = [Counting() for _ in range(LAYERS)]
    stage = make_stage(layers, 2)  # type: ignore[arg-type]
    context = ToyContext(torch.ones(3), torch.zeros(3, WIDTH))
    y = stage.forward(0, torch.randn(3, WIDTH), context)
    stage.backward(0, torch.ones_like(y))
    assert [layer.calls for layer in layers] == [2, 2, 1, 1, 1, 1]
    with torch.no_grad():
        assert not stage.forward(0, torch.randn(3, WIDTH), context).requires_grad
    assert [layer.calls for layer in layers] == [3, 3, 2, 2, 2, 2]
    assert not stage._saved


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("split", [False, True])
def test_integer_inputs_have_no_gradient(split, segments):
    """backward_weight runs the full backward of the first stage."""

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, WIDTH)

        def forward(self, x: Tensor, context: Any) -> Tensor:
            return self.table(x)

    class Double(nn.Module):
        def forward(self, x: Tensor, context: Any) -> Tensor:
            return 2 * x

    layers = [Embed(), Double()]
    before = [DeviceLayers(layers[:1], recompute=True)] if segments == 2 else []
    stage = Stage(DeviceLayers(layers[segments - 1 : segments]), CPU, before)  # the embedding, and a factor of 2
    y = stage.forward(3, torch.tensor([1, 1, 2]), None)
    assert (stage.backward_input if split else stage.backward)(3, torch.ones_like(y)) is None
    if split:
        assert layers[0].table.weight.grad is None
        stage.backward_weight(3)
    assert layers[0].table.weight.grad[:, 0].tolist() == [n * segments for n in (0, 2, 1, 0, 0, 0, 0)]


def test_clear_drops_all_microbatches():
    layers, batches = make()
    stage = make_stage(layers, 0)
    for i in range(2):
        y = stage.forward(i, batches[i].inputs, batches[i].context)
    stage.backward_input(0, torch.ones_like(y))
    assert stage._saved
    assert stage._weight_backwards
    stage.clear()
    assert not stage._saved
    assert not stage._weight_backwards


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_autocast(dtype, expected):
    class Product(nn.Module):
        def forward(self, x: Tensor, context: Any) -> Tensor:
            return x @ x

    x = torch.randn(2, 2)
    assert Autocast(Product(), dtype)(x, None).dtype == expected
    assert DeviceLayers([Product()], autocast=dtype)(x, None).dtype == expected


def test_only_regular_layers_split_their_backward():
    assert DeviceLayers([]).splits_backward
    assert not DeviceLayers([], recompute=True).splits_backward


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("split", [False, True])
def test_frozen_layers_have_no_gradient_and_change_no_other(recomputed, split):
    layers, batches = make()
    _, expected = reference(layers, batches)
    for layer in layers[:3]:
        layer.requires_grad_(False)
    stage = make_stage(layers, recomputed)
    for i, batch in enumerate(batches):
        y = stage.forward(i, batch.inputs, batch.context)
        loss, _ = objective(y, batch.context)
        (stage.backward_input if split else stage.backward)(i, *torch.autograd.grad(loss, y))
        if split:
            stage.backward_weight(i)
    gradients = [p.grad for layer in layers for p in layer.parameters()]
    assert gradients[:6] == [None] * 6
    assert all(map(torch.equal, gradients[6:], expected[6:]))
