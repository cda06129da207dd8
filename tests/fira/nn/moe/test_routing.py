"""Ways to choose experts and to keep them in balance."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fira import FIRA
from fira.models.fira import FiraConfig
from fira.nn.context import Context, TrainingContext
from fira.nn.moe.aux_losses import load_balance, router_z
from fira.nn.moe.capacity import within_capacity
from fira.nn.moe.experts import Experts
from fira.nn.moe.grouped_linear import RowGroups
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Routed, Router

CONFIG = FiraConfig(vocab_size=13, seq_len=9, d_model=8, n_head=2, num_layers=2, d_ff=12, dropout=0.0)
LENGTHS = torch.tensor([9, 5])


def make_moe(capacity_factor: float = 0.0, **routing: Any) -> MoE:
    torch.manual_seed(0)
    router = Router(6, 4, 2, **routing)
    moe = MoE(router, Experts(4, 6, 5, 0.0, "experts"), 4, 1, [], capacity_factor=capacity_factor).double()
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    return moe


def training(lengths: Tensor = LENGTHS) -> Context:
    return Context(lengths=lengths, training=TrainingContext(aux_weights=(lengths / lengths.sum()).double()))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_weights_are_a_softmax_over_the_kept_or_the_kept_of_a_softmax(temperature: float) -> None:
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


def test_standard_and_z_loss_by_hand() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 4, dtype=torch.float64)
    routed = Routed(logits.topk(2).indices, logits.topk(2).values, logits)
    valid = torch.arange(9) < LENGTHS[:, None]
    for row, length in enumerate(LENGTHS.tolist()):
        p = logits[row, :length].exp() / logits[row, :length].exp().sum(1, keepdim=True)
        share = [(routed.experts[row, :length] == e).sum() / length for e in range(4)]
        expected = 4 * sum(f * p[:, e].mean() for e, f in enumerate(share))
        torch.testing.assert_close(load_balance(routed, logits, valid)[row], expected)
        z = sum(math.log(sum(math.exp(v) for v in token)) ** 2 for token in logits[row, :length].tolist()) / length
        assert float(router_z(routed, logits, valid)[row]) == pytest.approx(z)


@pytest.mark.parametrize("factor", [0.3, 1.0, 5.0])
def test_capacity_takes_those_who_come_first(factor: float) -> None:
    torch.manual_seed(0)
    experts = torch.randn(2, 9, 4).topk(2).indices
    taken = within_capacity(experts, torch.arange(9) < LENGTHS[:, None], 4, factor)
    for row, length in enumerate(LENGTHS.tolist()):
        room = [math.ceil(factor * 2 * length / 4)] * 4
        for t in range(9):
            for choice, e in enumerate(experts[row, t].tolist()):
                fits = t < length and room[e] > 0
                room[e] -= fits
                assert bool(taken[row, t, choice]) == fits


@pytest.mark.parametrize("factor", [0.5, 9.0])
def test_what_is_dropped_is_zero_is_counted_and_is_not_computed(factor: float) -> None:
    moe, free = make_moe(factor), make_moe()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    context, valid = training(), torch.arange(9) < LENGTHS[:, None]
    y = moe(x, context, None)
    routed = Routed(*(part.unflatten(0, (2, 9)) for part in moe.router(x.flatten(0, 1))))
    taken = within_capacity(routed.experts, valid, 4, factor)
    expected = torch.zeros_like(x)
    for b, t, j in taken.nonzero().tolist():
        alone = RowGroups(F.one_hot(routed.experts[b, t, j], 4))
        expected[b, t] += (routed.weights[b, t, j] * free.experts(x[b, t : t + 1], alone, None)[0]).detach()
    torch.testing.assert_close(y, expected)
    stats = context.training.stats[1, 0]
    assert int(stats.load.sum()) == 2 * int(LENGTHS.sum())
    assert int(stats.dropped.sum()) == int((valid[..., None] & ~taken).sum())
    assert (int(stats.dropped.sum()) > 0) == (factor < 1)
    with FlopCounterMode(display=False) as flops:
        moe(x, training(), None)
    assert flops.get_total_flops() == 2 * (18 * 6 * 4 + int(taken.sum()) * 2 * 6 * 5)  # router, then both products
    assert torch.equal(moe(x, Context(), None), free(x, Context(), None))  # in use nothing is dropped


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1]])
def test_nothing_depends_on_the_split(sizes: list[int]) -> None:
    """Capacity, noise and losses are a sequence's own."""
    config = replace(
        CONFIG, capacity_factor=0.8, noise=0.3, switch_coefficient=0.2, z_coefficient=0.1, balance_rate=0.1, dropout=0.2
    )
    lengths = torch.tensor([9, 5, 7, 1])
    tokens = torch.randint(13, (4, 9), generator=torch.Generator().manual_seed(0))
    whole, parts = FIRA(config).double(), FIRA(config).double()
    context = replace(training(lengths), keys=torch.arange(4) * 2**33 + 5)
    whole(tokens, context).square().sum().backward()
    pieces = replace(context, training=replace(context.training, stats={})).split(sizes)
    for piece, some in zip(pieces, tokens.split(sizes), strict=True):
        parts(some, piece).square().sum().backward()
    for layer in (1, 2):
        for name in ("load", "dropped", "entropy", "aux"):
            total = sum(getattr(pieces[0].training.stats[layer, part], name) for part in range(len(sizes)))
            torch.testing.assert_close(total, getattr(context.training.stats[layer, 0], name))
        assert int(context.training.stats[layer, 0].dropped.sum()) > 0
    for (name, parameter), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_no_token_is_dropped_for_the_sake_of_a_later_one() -> None:
    moe, x = make_moe(0.5), torch.randn(1, 9, 6, dtype=torch.float64)
    before = moe(x, training(torch.tensor([9])), None)
    for t in range(9):
        changed = x.clone()
        changed[0, t] = torch.randn(6, dtype=torch.float64)
        after = moe(changed, training(torch.tensor([9])), None)
        torch.testing.assert_close(after[0, :t], before[0, :t], rtol=1e-12, atol=1e-12)


def test_the_bias_evens_the_load_and_leaves_the_weights_alone() -> None:
    """Without any loss, on tokens that all prefer the same experts."""
    moe = make_moe(balance_rate=0.003)
    with torch.no_grad():
        moe.router.gate.weight *= 0.3  # as undecided as routers are at the start
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


def test_the_bias_is_part_of_what_is_saved() -> None:
    model = FIRA(replace(CONFIG, balance_rate=0.1))
    names = {f"layers.{layer}.moe.router.balance" for layer in (1, 2)}
    assert set(model.weights()) - set(FIRA(CONFIG).weights()) == names
    assert all(bool((model.weights()[name] == 0).all()) for name in names)


def test_entropy_is_that_of_the_router() -> None:
    moe, context = make_moe(), training()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    moe(x, context, None)
    p = F.softmax(moe.router.gate(x), dim=-1).detach()
    by_hand = -sum(float((p[row, t] * p[row, t].log()).sum()) for row in (0, 1) for t in range(int(LENGTHS[row])))
    assert float(context.training.stats[1, 0].entropy) == pytest.approx(by_hand)
