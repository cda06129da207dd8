"""The exchange of tokens between ranks with experts against loops over tokens."""

import random
from typing import Any

import pytest

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
