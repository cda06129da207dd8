"""Sorting rows by expert, and the weighted sum of expert outputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fira.nn.moe.dispatcher import TokenDispatcher
from fira.nn.moe.permutation import count_by_expert, gather_rows, sort_by_expert, weighted_sum


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40))
def test_sort_by_expert_is_stable_and_inverse_restores_order(experts: list[int]) -> None:
    order, inverse = sort_by_expert(torch.tensor(experts, dtype=torch.int64))
    assert order.tolist() == sorted(range(len(experts)), key=lambda i: experts[i])
    assert order[inverse].tolist() == list(range(len(experts)))


def test_gather_rows_gradient() -> None:
    order, inverse = sort_by_expert(torch.tensor([2, 0, 1, 0, 2, 2]))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: gather_rows(x, order, inverse, 2), (x,))


def test_weighted_sum_equals_loop() -> None:
    """Rows are in the order of their experts. Compare values and gradients, also with weights of lower precision."""
    plan = TokenDispatcher().plan(torch.tensor([[2, 0], [1, 0], [2, 1]]), 3)
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    at = [(4, 0), (2, 1), (5, 3)]  # indices of each token's rows, sorted by expert
    expected = torch.stack([sum(weights[n, j] * rows[at[n][j]] for j in range(2)) for n in range(3)])
    torch.testing.assert_close(weighted_sum(rows, weights, plan.order, plan.inverse), expected)
    assert gradcheck(lambda *inputs: weighted_sum(*inputs, plan.order, plan.inverse), (rows, weights))
    assert weighted_sum(rows.bfloat16(), weights.float(), plan.order, plan.inverse).dtype == torch.float32


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_gather_and_weighted_sum_equal_loops_with_and_without_gradients(
    top_k: int, tokens: int, enabled: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, 4, generator=generator).topk(top_k).indices
    order, inverse = sort_by_expert(experts.flatten())
    x, weights = torch.randn(tokens, 3, generator=generator), torch.rand(tokens, top_k, generator=generator)
    with torch.set_grad_enabled(enabled):
        rows = gather_rows(x, order, inverse, top_k)
        total = weighted_sum(rows * experts.flatten()[order][:, None], weights, order, inverse)
        single = gather_rows(rows, inverse, order)
    assert torch.equal(rows, torch.stack([x[i // top_k] for i in order.tolist()]))
    assert torch.equal(single, torch.stack([x[n] for n in range(tokens) for _ in range(top_k)]))
    for n in range(tokens):
        expected = sum(weights[n, j] * experts[n, j] * x[n] for j in range(top_k))
        torch.testing.assert_close(total[n], expected, msg=f"token {n}")


@pytest.mark.parametrize("weights", [None, [5, 0, 2, -1]])
def test_count_by_expert_equals_loop(weights: list[int] | None) -> None:
    experts = [3, 0, 3, 1]
    counts = count_by_expert(torch.tensor(experts), 5, None if weights is None else torch.tensor(weights))
    expected = [0] * 5
    for expert, weight in zip(experts, weights or [1] * 4, strict=True):
        expected[expert] += weight
    assert counts.tolist() == expected
