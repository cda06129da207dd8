"""The router's arguments: experts per token as a number or a fraction, and the defaults."""

import pytest
import torch

from fira.nn.dropout import at_place, normal, salt
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


def test_noise_is_normal_by_token_key_and_name_and_is_scaled() -> None:
    torch.manual_seed(0)
    x, keys = torch.randn(5, 6), torch.arange(5, dtype=torch.int32)
    plain = Router(6, 4, 2)
    for noise, name in ((0.3, "layers.1.router"), (1.5, "layers.2.router")):
        router = Router(6, 4, 2, noise=noise, name=name)
        router.load_state_dict(plain.state_dict())
        expected = plain(x).logits + noise * normal(at_place(keys, salt(name)), 4)
        torch.testing.assert_close(router(x, keys).logits, expected, check_dtype=False)
        assert torch.equal(router(x).logits, plain(x).logits)


@pytest.mark.parametrize("renormalise", [True, False])
def test_bias_chooses_experts_but_does_not_change_their_weights(renormalise: bool) -> None:
    torch.manual_seed(0)
    router, x = Router(6, 4, 2, balance_rate=0.25, renormalise=renormalise), torch.randn(50, 6)
    router.rebalance(torch.tensor([0, 4, 2, 2]).double())
    router.rebalance(torch.tensor([1, 5, 7, 3]).double())
    assert router.balance.tolist() == [0.5, -0.5, -0.25, 0.25]
    routed = router(x)
    p = routed.logits.softmax(1)
    chosen = (p + torch.tensor([0.5, -0.5, -0.25, 0.25])).argsort(1, descending=True)[:, :2]
    assert torch.equal(routed.experts, chosen)
    kept = p.gather(1, chosen)
    torch.testing.assert_close(routed.weights, kept / kept.sum(1, keepdim=True) if renormalise else kept)
    unbiased = Router(6, 4, 2)
    unbiased.rebalance(torch.tensor([0, 4, 2, 2]).double())
    assert not list(unbiased.buffers())


def test_logits_are_computed_in_the_precision_of_the_weights_under_autocast() -> None:
    torch.manual_seed(0)
    router, x = Router(6, 4, 2), torch.randn(5, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(x).logits
    assert torch.equal(logits, router(x.float()).logits)
