"""Bytes that ranks exchange per token and MoE layer, counted by an all-to-all that simulates a group of one rank."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.nn.context import Context
from fira.nn.moe import layer
from fira.nn.moe.experts import Experts
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Router
from fira.parallel import expert_parallel
from fira.parallel.expert_parallel import AllToAllDispatcher

WIDTH, TOP_K = 16, 2


class Counted(torch.autograd.Function):
    """Identity that records the bytes of its input and of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int]) -> Tensor:
        ctx.sent = sent
        sent.append(x.nbytes)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.sent.append(grad.nbytes)
        return grad, None


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each exchange of floating-point rows."""
    exchanges: list[int] = []

    def all_to_all(x: Tensor, send: list[int], receive: list[int], group: object) -> Tensor:
        return Counted.apply(x, exchanges) if x.is_floating_point() else x

    monkeypatch.setattr(expert_parallel, "all_to_all", all_to_all)
    monkeypatch.setattr(dist, "all_to_all_single", lambda out, x, group: out.copy_(x))
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    return exchanges


def train(dtype: torch.dtype, autocast: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
    """The output of a layer for 8 tokens, and the gradients of its input and its parameters."""
    torch.manual_seed(0)
    moe = MoE(Router(WIDTH, 4, TOP_K), Experts(4, WIDTH, 8, 0.0, "experts"), 4, 1, []).to(dtype)
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    moe.dispatcher = AllToAllDispatcher(None)
    x = torch.randn(2, 4, WIDTH, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = moe(x, Context(), None)
    return y.detach(), list(torch.autograd.grad(y.square().sum(), [x, *moe.parameters()]))


def without_early_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the cast to the experts' first product."""
    monkeypatch.setattr(layer, "product_dtype", lambda x: x.dtype)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_rows_are_exchanged_in_the_dtype_of_autocast(monkeypatch, sent, autocast) -> None:
    y, gradients = train(torch.float32, autocast)
    per_row = [count / (8 * TOP_K * WIDTH) for count in sent]
    assert per_row == [2, 2, 2, 2]  # dispatch, combine, and their backward passes in reverse order
    sent.clear()
    without_early_cast(monkeypatch)
    plain_y, plain_gradients = train(torch.float32, autocast)
    assert [count / (8 * TOP_K * WIDTH) for count in sent] == [4, 2, 2, 4]
    assert torch.equal(y, plain_y)
    for gradient, plain in zip(gradients, plain_gradients, strict=True):
        assert (gradient - plain).norm() < 0.01 * plain.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_autocast_nothing_changes(monkeypatch, sent, dtype) -> None:
    y, gradients = train(dtype, None)
    assert {count / (8 * TOP_K * WIDTH) for count in sent} == {dtype.itemsize}
    without_early_cast(monkeypatch)
    plain_y, plain_gradients = train(dtype, None)
    assert all(map(torch.equal, [y, *gradients], [plain_y, *plain_gradients]))
