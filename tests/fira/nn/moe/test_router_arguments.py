"""The router's arguments: experts per token as a number or a fraction, and the defaults."""

import pytest
import torch

from fira.nn.moe.router import Router, number_chosen


@pytest.mark.parametrize(
    ("top_k", "num_experts", "expected"),
    [(3, 4, 3), (1, 4, 1), (1.0, 4, 4), (0.8, 4, 3), (0.75, 4, 3), (0.5, 4, 2), (0.1, 4, 1), (15 / 22, 22, 15)],
)
def test_fraction_is_rounded_down_to_at_least_one(top_k: int | float, num_experts: int, expected: int) -> None:
    assert number_chosen(top_k, num_experts) == expected


@pytest.mark.parametrize("top_k", [0, 5, 1.5, -1])
def test_numbers_outside_the_experts_are_refused(top_k: int | float) -> None:
    with pytest.raises(ValueError, match="top_k"):
        Router(6, 4, top_k)


@pytest.mark.parametrize("top_k", [1, 4])
def test_one_and_all_experts_are_allowed(top_k: int) -> None:
    assert Router(6, 4, top_k).top_k == top_k


def test_defaults_are_a_softmax_over_the_kept_logits_without_noise() -> None:
    torch.manual_seed(0)
    router, x = Router(6, 4, 2), torch.randn(5, 6)
    routed = router(x, torch.arange(5, dtype=torch.int32))
    logits = x @ router.gate.weight.T + router.gate.bias
    torch.testing.assert_close(routed.logits, logits)
    kept, experts = logits.sort(descending=True)
    assert torch.equal(routed.experts, experts[:, :2])
    torch.testing.assert_close(routed.weights, kept[:, :2].softmax(1))
    assert not list(router.buffers())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logits_are_divided_by_the_temperature(temperature: float) -> None:
    router, x = Router(6, 4, 2, temperature=temperature), torch.ones(1, 6)
    torch.testing.assert_close(router(x).logits, router.gate(x) / temperature)
