"""The MoE layer: gradients, work per token, dropped assignments, statistics and independence of micro-batches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from fira import FIRA
from fira.models.registry import PRESETS
from fira.nn.context import Context, TrainingContext
from fira.nn.moe.capacity import within_capacity
from fira.nn.moe.grouped_linear import RowGroups
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Routed
from tests import reference_models as reference
from tests.fira.models.small_fira import CONFIG, make_moe
from tests.fira.nn.moe import small_moe


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_dispatch_gradient_against_finite_differences(top_k: int) -> None:
    torch.manual_seed(0)
    moe = make_moe(top_k, width=3)
    names = [name for name, _ in moe.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in moe.parameters()]
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(moe, dict(zip(names, values, strict=True)), (x, Context(), None))

    assert gradcheck(output, (x, *values))


def test_auxiliary_gradient_against_finite_differences() -> None:
    """The auxiliary loss is not part of the output, but gradients are those of the sum of output and loss."""
    moe = make_moe()
    x = torch.randn(3, 5, 6, dtype=torch.float64)

    def objective() -> tuple[Tensor, float]:
        context = Context(training=TrainingContext(aux_weights=torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)))
        y = moe(x, context, None).square().sum()
        return y, y.item() + context.training.stats[1, 0].aux.item()

    objective()[0].backward()
    weight = moe.router.gate.weight
    for entry in [(0, 0), (1, 3), (3, 5)]:
        values = []
        for change in (1e-6, -1e-6):
            with torch.no_grad():
                weight[entry] += change
                values.append(objective()[1])
                weight[entry] -= change
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(weight.grad[entry]), rel=1e-6)


def test_expert_gradients_equal_reference_and_are_zero_without_tokens() -> None:
    moe = make_moe(num_experts=5)
    with torch.no_grad():
        moe.router.gate.bias[3] = -1e3  # expert 3 is not chosen by any token
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    moe(x, Context(), None).square().sum().backward()

    p = {name: value.detach().clone().requires_grad_() for name, value in moe.named_parameters()}
    sum(reference.fira_experts(sequence, p, 2)[0].square().sum() for sequence in x).backward()
    for name in ("w1", "b1", "w2", "b2"):
        grad = getattr(moe.experts, name).grad
        for e in range(5):
            torch.testing.assert_close(grad[e], p[f"experts.{name}"].grad[e], rtol=1e-10, atol=1e-10)
            assert bool((grad[e] == 0).all()) == (e == 3)


@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_compute_only_their_tokens(top_k: int) -> None:
    moe = make_moe(top_k)
    x = torch.randn(4, 8, 6, dtype=torch.float64)
    with FlopCounterMode(display=False) as flops:
        moe(x, Context(), None)
    tokens = 4 * 8
    assert flops.get_total_flops() == tokens * (2 * 6 * 4 + top_k * 2 * 2 * 6 * 5)  # router and two products

    chosen = moe.router(x.flatten(0, 1))[0]
    with torch.no_grad():
        moe.experts.w1[2] = torch.nan
    is_nan = moe(x, Context(), None).flatten(0, 1).isnan().any(1)
    assert is_nan.any()
    assert not is_nan.all()
    assert torch.equal(is_nan, (chosen == 2).any(1))


@pytest.mark.parametrize("factor", [0.5, 9.0])
def test_dropped_assignments_are_zero_and_counted_and_not_computed(factor: float) -> None:
    moe, unlimited = small_moe.make_moe(factor), small_moe.make_moe()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    context, valid = small_moe.training(), torch.arange(9) < small_moe.LENGTHS[:, None]
    y = moe(x, context, None)
    routed = Routed(*(part.unflatten(0, (2, 9)) for part in moe.router(x.flatten(0, 1))))
    accepted = within_capacity(routed.experts, valid, 4, factor)
    expected = torch.zeros_like(x)
    for b, t, j in accepted.nonzero().tolist():
        single = RowGroups(F.one_hot(routed.experts[b, t, j], 4))
        expected[b, t] += (routed.weights[b, t, j] * unlimited.experts(x[b, t : t + 1], single, None)[0]).detach()
    torch.testing.assert_close(y, expected)
    stats = context.training.stats[1, 0]
    assert int(stats.load.sum()) == 2 * int(small_moe.LENGTHS.sum())
    assert int(stats.dropped.sum()) == int((valid[..., None] & ~accepted).sum())
    assert (int(stats.dropped.sum()) > 0) == (factor < 1)
    with FlopCounterMode(display=False) as flops:
        moe(x, small_moe.training(), None)
    assert flops.get_total_flops() == 2 * (18 * 6 * 4 + int(accepted.sum()) * 2 * 6 * 5)  # router and two products
    assert torch.equal(moe(x, Context(), None), unlimited(x, Context(), None))  # nothing is dropped outside training


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1]])
def test_routing_does_not_depend_on_micro_batches(sizes: list[int]) -> None:
    """Capacity, noise and auxiliary losses are defined per sequence."""
    config = replace(
        CONFIG, capacity_factor=0.8, noise=0.3, switch_coefficient=0.2, z_coefficient=0.1, balance_rate=0.1, dropout=0.2
    )
    lengths = torch.tensor([9, 5, 7, 1])
    tokens = torch.randint(13, (4, 9), generator=torch.Generator().manual_seed(0))
    full, split = FIRA(config).double(), FIRA(config).double()
    context, other_context = small_moe.training(lengths), small_moe.training(lengths)
    context.keys = other_context.keys = torch.arange(4) * 2**33 + 5
    full(tokens, context).square().sum().backward()
    contexts = other_context.split(sizes)
    for chunk_context, chunk in zip(contexts, tokens.split(sizes), strict=True):
        split(chunk, chunk_context).square().sum().backward()
    for layer in (1, 2):
        for name in ("load", "dropped", "entropy", "aux"):
            total = sum(getattr(contexts[0].training.stats[layer, part], name) for part in range(len(sizes)))
            torch.testing.assert_close(total, getattr(context.training.stats[layer, 0], name))
        assert int(context.training.stats[layer, 0].dropped.sum()) > 0
    for (name, parameter), other in zip(full.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_bias_is_part_of_the_state() -> None:
    model = FIRA(replace(CONFIG, balance_rate=0.1))
    names = {f"layers.{layer}.moe.router.balance" for layer in (1, 2)}
    assert set(model.weights()) - set(FIRA(CONFIG).weights()) == names
    assert all(bool((model.weights()[name] == 0).all()) for name in names)


def test_entropy_equals_its_formula() -> None:
    moe, context = small_moe.make_moe(), small_moe.training()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    moe(x, context, None)
    p = F.softmax(moe.router.gate(x), dim=-1).detach()
    expected = -sum(
        float((p[row, t] * p[row, t].log()).sum()) for row in (0, 1) for t in range(int(small_moe.LENGTHS[row]))
    )
    assert float(context.training.stats[1, 0].entropy) == pytest.approx(expected)


def test_single_token_gives_zero_gradient_to_other_experts() -> None:
    """The sum of the gradients of single tokens equals the gradient of all tokens together."""
    model = FIRA(replace(PRESETS["fira-tiny"], dropout=0.0)).double()
    block = next(module for module in model.modules() if isinstance(module, MoE))
    x = torch.randn(1, 3, block.router.gate.in_features, dtype=torch.float64)
    block(x, Context(), None).sum().backward()
    together = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    for token in x.unbind(1):
        junk = [torch.full_like(p, 7.0) for p in block.parameters()]  # uninitialised memory would contain these values
        del junk
        block(token[:, None], Context(), None).sum().backward()
    for parameter, expected in zip(block.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12)
