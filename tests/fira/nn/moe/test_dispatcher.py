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
    rows = dispatcher.dispatch(x, plan, top_k)
    # position of each assignment's expert in the sorted order, and the assignment's token
    at = [(order.index(e), n) for n, chosen in enumerate(experts.tolist()) for e in chosen]
    assert torch.equal(rows, x[[n for _, n in sorted(at, key=lambda pair: pair[0])]])
    combined = gather_rows(dispatcher.combine(rows, plan), plan.inverse, plan.order)
    assert torch.equal(combined, x.repeat_interleave(top_k, 0))

    factor = torch.randn(combined.shape, generator=generator, dtype=torch.float64)
    (combined * factor).sum().backward()
    torch.testing.assert_close(x.grad, factor.unflatten(0, (tokens, top_k)).sum(1))
