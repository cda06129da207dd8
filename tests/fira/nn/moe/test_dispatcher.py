"""Dispatch of rows to the experts of one rank, and combine."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fira.nn.moe.dispatcher import TokenDispatcher
from fira.nn.moe.permutation import gather_rows


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 12), st.integers(0, 2**31))
def test_dispatch_then_combine_is_the_identity(top_k: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, 5, generator=generator).topk(top_k).indices
    x = torch.randn(tokens, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    dispatcher = TokenDispatcher()
    plan = dispatcher.plan(experts, 5)
    order = list(plan.groups.sizes)  # of experts
    assert plan.groups.sizes == {e: n for e in order if (n := int((experts == e).sum())) or tokens != 1}
    arrived = []
    outputs = dispatcher.run(x, None, plan, top_k, lambda rows, groups, keys: arrived.append(rows) or rows)
    # position of each assignment's expert in the sorted order, and the assignment's token
    at = [(order.index(e), n) for n, chosen in enumerate(experts.tolist()) for e in chosen]
    assert torch.equal(arrived[0], x[[n for _, n in sorted(at, key=lambda pair: pair[0])]])
    combined = gather_rows(outputs, plan.inverse, plan.order)
    assert torch.equal(combined, x.repeat_interleave(top_k, 0))

    factor = torch.randn(combined.shape, generator=generator, dtype=torch.float64)
    (combined * factor).sum().backward()
    torch.testing.assert_close(x.grad, factor.unflatten(0, (tokens, top_k)).sum(1))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.booleans(), st.integers(0, 2**31))
def test_dropped_assignments_are_sorted_last_and_belong_to_no_group(
    top_k: int, tokens: int, dropped: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, 4, generator=generator).topk(top_k).indices
    if dropped:
        experts[torch.rand(experts.shape, generator=generator) < 0.4] = 4
    plan = TokenDispatcher().plan(experts, 4, dropped=dropped)
    flat = experts.flatten().tolist()
    assert plan.groups.ragged == dropped
    if tokens == 1 and not dropped:  # not sorted: the groups are in the order of the choices
        assert plan.groups.counts is None
        assert list(plan.groups.sizes.items()) == [(e, 1) for e in flat]
        assert plan.order.tolist() == plan.inverse.tolist() == list(range(top_k))
    else:
        assert plan.groups.counts is not None
        assert plan.groups.counts.tolist() == [flat.count(e) for e in range(4)]
        assert plan.order.tolist() == sorted(range(len(flat)), key=lambda i: flat[i])
        assert plan.order[plan.inverse].tolist() == list(range(len(flat)))


def test_keys_arrive_with_their_rows() -> None:
    experts, x = torch.tensor([[2, 0], [1, 2]]), torch.tensor([[7.0], [8.0]])
    plan = TokenDispatcher().plan(experts, 4)
    keys = torch.tensor([70, 71, 80, 81])
    arrived = []
    TokenDispatcher().run(x, keys, plan, 2, lambda rows, groups, keys: arrived.extend((rows, keys)) or rows)
    assert [part.flatten().tolist() for part in arrived] == [[7, 8, 7, 8], [71, 80, 70, 81]]


def test_single_assignment_is_dispatched_unchanged() -> None:
    plan = TokenDispatcher().plan(torch.tensor([[2]]), 4)
    outputs = TokenDispatcher().run(torch.tensor([[7.0]]), None, plan, 1, lambda rows, groups, keys: rows)
    assert outputs.tolist() == [[7]]


def test_one_token_on_a_device_is_planned_without_reading_its_experts() -> None:
    """A tensor on meta has no values that could be copied to the host."""
    plan = TokenDispatcher().plan(torch.zeros(1, 2, dtype=torch.int64, device="meta"), 4)
    assert plan.groups.counts is not None
    assert plan.groups.counts.shape == (4,)
    assert plan.order.device.type == "meta"
