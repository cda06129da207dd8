"""The exchange of tokens between ranks with experts: against loops over tokens, and the bytes that are sent."""

import random
from types import SimpleNamespace
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
from fira.parallel.expert_parallel import AllToAllDispatcher
from pipeline.split_backward import SplitBackward
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
def both_results() -> list[list[list[dict[str, Any]]]]:
    """By rank, number of parts and case."""
    return run_function(RANKS, "tests.ranks.dispatch_ranks", "exchange", cases=CASES)


@pytest.fixture(params=[1, 2], ids=["in line", "two parts"])
def results(request: pytest.FixtureRequest, both_results: Any) -> list[list[dict[str, Any]]]:
    """By rank and case."""
    return [of_rank[request.param - 1] for of_rank in both_results]


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


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_layer_in_two_parts_is_bitwise_identical(ranks: int) -> None:
    """With dropout, experts without rows, dropped assignments, and a split backward; 4 ranks have one expert a part."""
    cases = [
        {"dropout": 0.0, "capacity": 0.0, "split": False},
        {"dropout": 0.3, "capacity": 0.5, "split": False},
        {"dropout": 0.3, "capacity": 0.5, "split": True},
    ]
    for of_rank in run_function(ranks, "tests.ranks.dispatch_ranks", "layers_in_parts", cases=cases):
        for case, result in zip(cases, of_rank, strict=True):
            assert set(result["distance of parts"]) == {0}, (case, result)
            assert max(result["distance of ranks"]) < 1e-12, case
            assert min(result["sizes"][:2]) > 1, case


WIDTH, TOP_K = 16, 2


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each exchange of floating-point rows, forward and backward."""
    exchanges: list[int] = []

    def all_to_all_single(out: Tensor, x: Tensor, *sizes: list[int], **_: Any) -> Any:
        if x.is_floating_point():
            exchanges.append(x.nbytes)
        out.copy_(x)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
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


def test_order_of_operations_in_two_parts(monkeypatch) -> None:
    """Exchanges and experts in the order of the host, which waits for an exchange as late as possible."""
    events: list[str] = []

    def all_to_all_single(out: Tensor, x: Tensor, *sizes: list[int], async_op: bool = False, **_: Any) -> Any:
        out.copy_(x)
        if not async_op:
            return None
        number = sum(event.startswith("start") for event in events)
        events.append(f"start {number}")
        return SimpleNamespace(wait=lambda: events.append(f"wait {number}"))

    def record(module: nn.Module, arguments: Any) -> None:
        events.append("experts")
        arguments[0].register_hook(lambda gradient: events.append("gradient"))

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    torch.manual_seed(0)
    moe = MoE(Router(WIDTH, 4, TOP_K), Experts(4, WIDTH, 8, 0.0, "experts"), 4, 1, [])
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    moe.dispatcher = AllToAllDispatcher(None, parts=2)
    moe.experts.register_forward_pre_hook(record)
    for split in (False, True):
        events.clear()
        x = torch.randn(2, 4, WIDTH, requires_grad=True)
        y = moe(x, Context(), None)
        dispatch = ["start 0", "start 1", "wait 0", "experts", "start 2", "wait 1", "experts", "start 3"]
        assert events == [*dispatch, "wait 2", "wait 3"]
        if split:
            SplitBackward(y, x).backward_input(torch.ones_like(y))
        else:
            y.sum().backward()
        backward = ["start 4", "start 5", "wait 4", "gradient", "start 6", "wait 5", "gradient", "start 7"]
        assert events[10:] == [*backward, "wait 6", "wait 7"]
