"""The exchange of tokens between ranks with experts: against loops over tokens, and the bytes that are sent."""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.nn.context import Context
from fira.nn.moe import layer
from fira.nn.moe.experts import Experts
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Router
from fira.parallel import expert_parallel
from fira.parallel.expert_parallel import AllToAllDispatcher
from tests.launch import run_function

RANKS, EXPERTS = 3, 6


def make_case(seed: int, top_k: int, tokens: list[int], dropped: float, experts: range = range(EXPERTS)) -> Any:
    """Random choices by rank; token n of rank r is [100 r + n, 1]. dropped: share of dropped assignments."""
    rng = random.Random(seed)
    choices = [[rng.sample(experts, top_k) for _ in range(count)] for count in tokens]
    return {
        "experts": [[[EXPERTS if rng.random() < dropped else e for e in row] for row in rank] for rank in choices],
        "tokens": [[[100 * r + n, 1] for n in range(count)] for r, count in enumerate(tokens)],
        "weights": [[[rng.randint(1, 9) for _ in range(top_k)] for _ in range(count)] for count in tokens],
    }


CASES = [
    make_case(1, 1, [4, 5, 3], 0.0),
    make_case(2, 2, [7, 1, 6], 0.0),
    make_case(3, 3, [5, 5, 5], 0.4),
    make_case(4, 2, [3, 4, 2], 0.2, range(2, 5)),  # rank 0 has no tokens for its experts
    make_case(5, 2, [2, 3, 1], 1.0),  # no token for any expert
    make_case(6, 1, [1, 2, 1], 0.0),  # ranks with one assignment
]


@pytest.fixture(scope="module")
def results() -> list[list[dict[str, Any]]]:
    """By rank and case."""
    return run_function(RANKS, "tests.ranks.dispatch_ranks", "exchange", cases=CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_experts_get_their_tokens_by_expert_then_rank_then_order(results: Any, number: int) -> None:
    case = CASES[number]
    for rank in range(RANKS):
        expected = [
            (e, case["tokens"][sender][n])
            for e in (2 * rank, 2 * rank + 1)
            for sender in range(RANKS)
            for n, chosen in enumerate(case["experts"][sender])
            if e in chosen
        ]
        assert results[rank][number]["rows"] == [row for _, row in expected]
        assert results[rank][number]["numbers"] == [e for e, _ in expected]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_outputs_and_gradients_return_to_their_tokens(results: Any, number: int) -> None:
    """Expert e multiplies by e + 1; the objective weights token n by n + 1; dropped assignments contribute nothing."""
    for rank in range(RANKS):
        experts, tokens, weights = (CASES[number][name][rank] for name in ("experts", "tokens", "weights"))
        factors = [[0 if e == EXPERTS else e + 1 for e in row] for row in experts]
        totals = [sum(f * w for f, w in zip(*pair, strict=True)) for pair in zip(factors, weights, strict=True)]
        result = results[rank][number]
        assert result["y"] == [[total * value for value in row] for total, row in zip(totals, tokens, strict=True)]
        assert result["grad_x"] == [[total * (n + 1)] * 2 for n, total in enumerate(totals)]
        sums = [sum(row) * (n + 1) for n, row in enumerate(tokens)]
        assert result["grad_w"] == [[f * total for f in row] for row, total in zip(factors, sums, strict=True)]


WIDTH, TOP_K = 16, 2


class Counted(torch.autograd.Function):
    """Identity that records the bytes of its input and of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int]) -> Tensor:
        ctx.sent = sent
        sent.append(x.nbytes)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.sent.append(grad.nbytes)
        return grad, None


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each exchange of floating-point rows."""
    exchanges: list[int] = []

    def all_to_all(x: Tensor, send: list[int], receive: list[int], group: object) -> Tensor:
        return Counted.apply(x, exchanges) if x.is_floating_point() else x

    monkeypatch.setattr(expert_parallel, "all_to_all", all_to_all)
    monkeypatch.setattr(dist, "all_to_all_single", lambda out, x, group: out.copy_(x))
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    return exchanges


def train(dtype: torch.dtype, autocast: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
    """The output of a layer for 8 tokens, and the gradients of its input and its parameters."""
    torch.manual_seed(0)
    moe = MoE(Router(WIDTH, 4, TOP_K), Experts(4, WIDTH, 8, 0.0, "experts"), 4, 1, []).to(dtype)
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    moe.dispatcher = AllToAllDispatcher(None)
    x = torch.randn(2, 4, WIDTH, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = moe(x, Context(), None)
    return y.detach(), list(torch.autograd.grad(y.square().sum(), [x, *moe.parameters()]))


def without_early_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the cast to the experts' first product."""
    monkeypatch.setattr(layer, "product_dtype", lambda x: x.dtype)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_rows_are_exchanged_in_the_dtype_of_autocast(monkeypatch, sent, autocast) -> None:
    y, gradients = train(torch.float32, autocast)
    per_row = [count / (8 * TOP_K * WIDTH) for count in sent]
    assert per_row == [2, 2, 2, 2]  # dispatch, combine, and their backward passes in reverse order
    sent.clear()
    without_early_cast(monkeypatch)
    plain_y, plain_gradients = train(torch.float32, autocast)
    assert [count / (8 * TOP_K * WIDTH) for count in sent] == [4, 2, 2, 4]
    assert torch.equal(y, plain_y)
    for gradient, plain in zip(gradients, plain_gradients, strict=True):
        assert (gradient - plain).norm() < 0.01 * plain.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_autocast_nothing_changes(monkeypatch, sent, dtype) -> None:
    y, gradients = train(dtype, None)
    assert {count / (8 * TOP_K * WIDTH) for count in sent} == {dtype.itemsize}
    without_early_cast(monkeypatch)
    plain_y, plain_gradients = train(dtype, None)
    assert all(map(torch.equal, [y, *gradients], [plain_y, *plain_gradients]))
