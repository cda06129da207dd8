"""The two parts of a split backward: bitwise identical to the full one, and no matrix product computed twice."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fira.models.adapters import add_adapters
from fira.models.registry import build, make_config
from fira.nn.context import Context
from fira.nn.init import initialise
from fira.nn.lora import Lora
from pipeline.split_backward import SplitBackward, run_backward

PRODUCT_NAMES = ("mm", "bmm", "addmm", "addmm_", "_grouped_mm", "embedding_dense_backward")
PRODUCTS = {getattr(torch.ops.aten, name, None) for name in PRODUCT_NAMES}  # torch 2.6 has no _grouped_mm


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.products += function.overloadpacket in PRODUCTS
        return function(*args, **kwargs or {})


def compare(f: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """Compare the split backward of f with the full one; return the parameters' gradients after the first part."""
    for p in parameters:
        p.grad = None
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    grad_output = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    with CountProducts() as whole:
        y.backward(grad_output)
    expected_grads = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    split = SplitBackward(f(other := x.clone().requires_grad_()), other)
    with CountProducts() as parts:
        grad_input = split.backward_input(grad_output)
        early = [None if p.grad is None else p.grad.clone() for p in parameters]
        split.backward_weight()
    assert torch.equal(grad_input, leaf.grad)
    assert other.grad is None
    for p, expected in zip(parameters, expected_grads, strict=True):
        assert (p.grad is None) == (expected is None)
        assert expected is None or torch.equal(p.grad, expected)
    assert parts.products == whole.products
    assert not split.junctions
    return early


@pytest.mark.parametrize("family", ["fira", "rish", "mooshak", "blues", "microrwkv"])
def test_blocks_of_every_family(family):
    config = make_config(f"{family}-tiny", {"vocab_size": 50, "seq_len": 16})
    model = build(config)
    tokens = torch.arange(24).view(2, 12) % 50
    context = Context.for_tokens(tokens, training=False)
    context.tokens = tokens
    blocks = model.layers[1:3]
    x = model.layers[0](tokens, context).detach()
    parameters = list(blocks.parameters())
    early = compare(lambda x: blocks[1](blocks[0](x, context), context), x, parameters)
    late = sum(p.numel() for p, gradient in zip(parameters, early, strict=True) if gradient is None)
    assert late > 0.9 * sum(p.numel() for p in parameters)  # most gradients are computed in the second part


@pytest.mark.parametrize("family", ["fira", "rish", "mooshak", "microrwkv"])
def test_blocks_with_frozen_weights_and_adapters(family):
    model = build(make_config(f"{family}-tiny", {"vocab_size": 50, "seq_len": 16}))
    add_adapters(model, Lora(2, 4.0, ("attention", "experts")))
    for index, layer in enumerate(model.layers):
        initialise(layer, f"layers.{index}", 0)
    tokens = torch.arange(24).view(2, 12) % 50
    context = Context.for_tokens(tokens, training=False)
    context.tokens = tokens
    blocks = model.layers[1:3]
    parameters = list(blocks.parameters())
    early = compare(
        lambda x: blocks[1](blocks[0](x, context), context), torch.randn(2, 12, model.config.d_model), parameters
    )
    assert all(gradient is None for gradient in early)  # all adapters are matrices
    assert all((p.grad is not None) == p.requires_grad for p in parameters)


def test_layers_without_trained_parameters():
    torch.manual_seed(0)
    linear, norm = nn.Linear(5, 5).requires_grad_(False), nn.LayerNorm(5).requires_grad_(False)
    parameters = [*linear.parameters(), *norm.parameters()]
    early = compare(lambda x: linear(norm(x)), torch.randn(4, 5), parameters)
    assert early == [None] * 4


def test_vectors_first_and_matrices_later():
    torch.manual_seed(0)
    linear, norm = nn.Linear(5, 5), nn.LayerNorm(5)
    early = compare(lambda x: linear(norm(x)), torch.randn(4, 5), [*linear.parameters(), *norm.parameters()])
    assert [gradient is None for gradient in early] == [True, False, False, False]  # weight, bias, gain, bias


def test_scalars_are_in_the_first_part():
    torch.manual_seed(0)
    weight, scale = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.tensor(2.0))
    early = compare(lambda x: (x * scale) @ (weight * 3), torch.randn(4, 5), [weight, scale])
    assert [gradient is None for gradient in early] == [True, False]


def test_vectors_on_both_sides_of_a_product():
    """A gain used in two places gets its gradient in the first part, a gain that scales a matrix in the second."""
    torch.manual_seed(0)
    weight, gain = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5))
    early = compare(lambda x: torch.tanh((x * gain) @ weight) * gain, torch.randn(4, 5), [weight, gain])
    assert [gradient is None for gradient in early] == [True, False]
    scale = nn.Parameter(torch.randn(5))
    early = compare(lambda x: x @ (weight * scale), torch.randn(4, 5), [weight, scale])
    assert [gradient is None for gradient in early] == [True, True]


def test_junction_with_two_outputs_and_one_gradient():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 5))
    compare(lambda x: torch.tanh((x @ weight.T).chunk(2, dim=1)[1]), torch.randn(4, 5), [weight])
    gate = nn.Parameter(torch.randn(4, 5))
    compare(lambda x: torch.tanh(torch.stack([x, x * gate]).unbind()[1]), torch.randn(4, 5), [gate])


def test_weight_used_twice_and_unused_weight():
    torch.manual_seed(0)
    linear, unused, table = nn.Linear(5, 5), nn.Linear(5, 5), nn.Embedding(7, 5)
    direct = nn.Parameter(torch.randn(5, 5))  # an operand of two products, without a node in between: in the first part

    def f(x: Tensor) -> Tensor:
        y = linear(torch.tanh(linear(x))) @ direct
        return (y @ direct).sigmoid() + table(torch.tensor([1, 1, 3, 6]))

    early = compare(f, torch.randn(4, 5), [*linear.parameters(), *unused.parameters(), *table.parameters(), direct])
    assert [gradient is None for gradient in early] == [True, False, True, True, True, False]


def test_computed_weight_that_two_products_share_is_in_the_first_part():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 5))

    def f(x: Tensor) -> Tensor:
        scaled = weight * 2
        return torch.tanh(x @ scaled) @ scaled + x

    assert compare(f, torch.randn(4, 5), [weight])[0] is not None


def test_gradients_are_added_to_those_of_earlier_microbatches():
    torch.manual_seed(0)
    linear = nn.Linear(5, 5)
    x = torch.randn(4, 5, requires_grad=True)
    for _ in range(2):
        split = SplitBackward(linear(x), x)
        split.backward_input(torch.ones(4, 5))
        split.backward_weight()
    assert torch.equal(linear.bias.grad, torch.full((5,), 8.0))
    assert torch.allclose(linear.weight.grad, 2 * x.sum(0).expand(5, 5))


@pytest.mark.parametrize("uses", [1, 2, 3, 4])
def test_gradients_of_a_shared_weight_are_summed_before_they_are_added_to_earlier_ones(uses):
    """Bitwise as in two full backwards."""
    torch.manual_seed(0)
    linear, x = nn.Linear(5, 5), torch.randn(40, 5, requires_grad=True)

    def f() -> Tensor:
        y = x + x.sin()  # two uses of the input too
        for _ in range(uses):
            y = linear(y.tanh())
        return y

    for _ in range(2):
        f().backward(torch.full((40, 5), 0.3))
    expected, linear.weight.grad = linear.weight.grad, None
    for _ in range(2):
        split = SplitBackward(f(), x)
        split.backward_input(torch.full((40, 5), 0.3))
        split.backward_weight()
    assert torch.equal(linear.weight.grad, expected)


def test_weight_gradients_belong_to_the_first_part():
    """Another backward through the same graph in between does not change them."""
    torch.manual_seed(0)
    linear = nn.Linear(5, 5, bias=False)
    x = torch.randn(4, 5, requires_grad=True)
    y = linear(x)
    split = SplitBackward(y, x)
    split.backward_input(torch.ones(4, 5))
    torch.autograd.grad(y, x, torch.zeros(4, 5), retain_graph=True)
    split.backward_weight()
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(5, 5))


def test_run_backward_equals_torch():
    x, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    y = (x**2).sin()
    gradients = run_backward([y], [torch.ones(3)], [x, unused], retain_graph=True)
    assert torch.equal(gradients[0], torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)[0])
    assert gradients[1] is None
    assert x.grad is None
    run_backward([y], [torch.ones(3)])
    assert torch.equal(x.grad, gradients[0])
    with pytest.raises(RuntimeError, match="second time"):
        run_backward([y], [torch.ones(3)])  # the graph was freed
