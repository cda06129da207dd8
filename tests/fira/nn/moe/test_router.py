"""The router: chosen experts, weights, noise, balancing bias and arguments."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from fira.nn.dropout import at_place, normal, salt, token_keys
from fira.nn.moe.router import Router, number_chosen
from tests.fira.nn.moe.small_moe import make_moe, training


@pytest.mark.parametrize(
    ("top_k", "num_experts", "expected"),
    [(3, 4, 3), (1, 4, 1), (1.0, 4, 4), (0.8, 4, 3), (0.75, 4, 3), (0.5, 4, 2), (0.1, 4, 1), (15 / 22, 22, 15)],
)
def test_fraction_is_rounded_down_to_at_least_one(top_k: int | float, num_experts: int, expected: int) -> None:
    assert number_chosen(top_k, num_experts) == expected


@pytest.mark.parametrize("top_k", [0, 5, 1.5, -1])
def test_invalid_top_k_raises(top_k: int | float) -> None:
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


def test_top_k_may_be_a_fraction_of_the_experts() -> None:
    assert Router(8, 4, 0.8).top_k == 3
    assert Router(8, 4, 0.7).top_k == 2  # rounded down
    assert Router(8, 4, 1.0).top_k == 4
    assert Router(8, 4, 0.01).top_k == 1
    assert all(Router(1, e, n / e).top_k == n for e in range(1, 60) for n in range(1, e + 1))
    for top_k in (0, 5, 1.5):
        with pytest.raises(ValueError, match="top_k"):
            Router(8, 4, top_k)


def test_gradient_against_finite_differences() -> None:
    torch.manual_seed(0)
    router = Router(5, 4, 2).double()
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = (p.detach().clone().requires_grad_() for p in router.parameters())

    def weights(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(router, {"gate.weight": weight, "gate.bias": bias}, (x,))[1]

    assert gradcheck(weights, (x, weight, bias))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_weights_are_renormalised_or_entries_of_the_full_softmax(temperature: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 6, dtype=torch.float64)
    renormalised, kept = (
        Router(6, 4, 2, temperature=temperature, renormalise=renormalise).double() for renormalise in (True, False)
    )
    kept.load_state_dict(renormalised.state_dict())
    for token in range(20):
        p = (renormalised.gate(x[token]) / temperature).exp()
        p = p / p.sum()
        best = sorted(range(4), key=lambda e: -float(p[e].detach()))[:2]
        for router, expected in ((kept, p[best]), (renormalised, p[best] / p[best].sum())):
            routed = router(x[token : token + 1])
            assert routed.experts[0].tolist() == best
            torch.testing.assert_close(routed.weights[0], expected)


def test_bias_balances_the_load_and_does_not_affect_the_weights() -> None:
    """There is no auxiliary loss, and all tokens prefer the same experts."""
    moe = make_moe(balance_rate=0.003)
    with torch.no_grad():
        moe.router.gate.weight *= 0.3  # small logits, as at the start of training
        moe.router.gate.bias.copy_(torch.tensor([1.0, 0.5, 0.0, -0.5]))
    x = torch.randn(8, 16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    imbalances = []
    for _ in range(120):
        context = training(torch.full((8,), 16))
        moe(x, context, None)
        load = context.training.stats[1, 0].load.double()
        imbalances.append(float(load.max() / load.mean()))
        moe.router.rebalance(load)
    assert imbalances[0] > 1.5
    assert sum(imbalances[-10:]) / 10 < 1.15
    routed = moe.router(x.flatten(0, 1))
    torch.testing.assert_close(routed.weights, routed.logits.gather(1, routed.experts).softmax(1))
    assert not routed.logits.topk(2).indices.equal(routed.experts)
    assert not moe.router.balance.requires_grad


def test_routing_noise_depends_on_sequence_and_name() -> None:
    router = Router(8, 4, 2, noise=0.5, name="first").double()
    other = Router(8, 4, 2, noise=0.5, name="second").double()
    other.load_state_dict(router.state_dict())
    x = torch.randn(6, 8, dtype=torch.float64)
    keys = token_keys(torch.tensor([3, 4, 5]), 0, 2).flatten()
    plain, noisy = router(x), router(x, keys)
    assert torch.equal(router(x[2:4], keys[2:4]).logits, noisy.logits[2:4])
    assert not torch.equal(other(x, keys).logits, noisy.logits)
    assert torch.equal(other(x).logits, plain.logits)
    assert noisy.weights.shape == (6, 2)
    difference = (noisy.logits - plain.logits).detach() / 0.5
    assert 0.3 < difference.std() < 2


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
