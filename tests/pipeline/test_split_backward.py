"""The two halves of a backward against the whole one: the same bits, and no product of matrices done twice."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fira.models.registry import build, make_config
from fira.nn.context import Context
from pipeline.split_backward import SplitBackward

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten._grouped_mm, aten.embedding_dense_backward}


class Count(TorchDispatchMode):
    """Counts the products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.products += function.overloadpacket in PRODUCTS
        return function(*args, **kwargs or {})


def halves(f: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """Compare the halves with the whole; the gradients of the parameters after the first half alone."""
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    gradient = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    with Count() as once:
        y.backward(gradient)
    whole = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    split = SplitBackward(f(other := x.clone().requires_grad_()), other)
    with Count() as twice:
        of_input = split.input_gradient(gradient)
        early = [p.grad for p in parameters]
        split.weight_gradients()
    assert torch.equal(of_input, leaf.grad)
    for p, expected in zip(parameters, whole, strict=True):
        assert (p.grad is None) == (expected is None)
        assert expected is None or torch.equal(p.grad, expected)
    assert twice.products == once.products
    return early


@pytest.mark.parametrize("family", ["fira", "rish", "mooshak", "blues", "microrwkv"])
def test_every_family(family):
    config = make_config(f"{family}-tiny", {"vocab_size": 50, "seq_len": 16})
    model = build(config)
    tokens = torch.arange(24).view(2, 12) % 50
    context = Context.for_tokens(tokens, training=False)
    blocks = model.layers[1:3]
    x = model.layers[0](tokens, context).detach()
    parameters = list(blocks.parameters())
    early = halves(lambda x: blocks[1](blocks[0](x, context), context), x, parameters)
    late = sum(p.numel() for p, gradient in zip(parameters, early, strict=True) if gradient is None)
    assert late > 0.9 * sum(p.numel() for p in parameters)  # what the first half leaves


def test_a_weight_that_is_used_twice_and_one_that_is_not_used():
    torch.manual_seed(0)
    linear, unused, table = nn.Linear(5, 5), nn.Linear(5, 5), nn.Embedding(7, 5)
    direct = nn.Parameter(torch.randn(5, 5))  # its products lead straight to it, both of them

    def f(x: Tensor) -> Tensor:
        y = linear(torch.tanh(linear(x))) @ direct
        return (y @ direct).sigmoid() + table(torch.tensor([1, 1, 3, 6]))

    halves(f, torch.randn(4, 5), [*linear.parameters(), *unused.parameters(), *table.parameters(), direct])


def test_a_tensor_that_several_products_share():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 5))

    def f(x: Tensor) -> Tensor:
        scaled = weight * 2
        return torch.tanh(x @ scaled) @ scaled + x

    halves(f, torch.randn(4, 5), [weight])
