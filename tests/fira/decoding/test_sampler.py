"""Sampling compared with transformers' logits processors on random logits, and exactly at the boundaries."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from fira.decoding.sampler import Sampler, draw
from fira.decoding.sampling import Sampling
from fira.errors import UserError
from tests.fira.decoding.small_models import chi_square

# In the order in which `generate` of transformers applies them.
PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram": NoRepeatNGramLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}


EXACT = [0.5, 0.25, 0.125, 0.0625, 0.0625]  # their sums are exact in floating point


def kept(probabilities: list[float], **options: Any) -> list[int]:
    """Tokens with a probability above zero."""
    [row] = Sampler(Sampling(**options)).probabilities(torch.empty(1, 0), torch.tensor([probabilities]).log2() * LN2)
    return row.nonzero().flatten().tolist()


LN2 = torch.tensor(2.0).log()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 1.7},
        *({"top_k": k} for k in (1, 2, 7, 40, 64)),
        *({"top_p": p} for p in (1e-9, 0.1, 0.5, 0.9, 0.97, 0.999)),
        *({"min_p": p} for p in (0.0, 0.01, 0.2, 1.0)),
        *({"typical_p": p} for p in (0.2, 0.9)),
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.7},
        {"no_repeat_ngram": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram": 1, "temperature": 0.8, "top_k": 30, "top_p": 0.8, "min_p": 0.03},
    ],
    ids=str,
)
def test_probabilities_equal_those_of_transformers(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(400, 64, generator=generator)
    ids = torch.randint(64, (400, 20), generator=generator)
    reference = LogitsProcessorList(make(options[name]) for name, make in PROCESSORS.items() if name in options)
    expected = reference(ids, logits.clone()).softmax(-1)
    probabilities = Sampler(Sampling(**options)).probabilities(ids, logits)
    assert torch.equal(probabilities > 0, expected > 0)
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-7)


def test_presence_penalty_is_subtracted_once_from_each_earlier_token() -> None:
    ids, logits = torch.tensor([[3, 1, 3]]), torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    expected = logits.clone()
    expected[0, [1, 3]] -= 0.75
    probabilities = Sampler(Sampling(presence_penalty=0.75)).probabilities(ids, logits)
    torch.testing.assert_close(probabilities, expected.softmax(-1))


@pytest.mark.parametrize(
    ("p", "count"),
    [(1e-12, 1), (0.49, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.751, 3), (0.875, 3), (0.9375, 4), (1.0, 5)],
)
def test_top_p_stops_at_the_token_that_reaches_p(p: float, count: int) -> None:
    """A cumulative probability exactly equal to p is sufficient."""
    logits = torch.tensor(EXACT).log2() * LN2
    assert logits.softmax(-1).tolist() == EXACT  # otherwise the boundary is not tested
    for order in (slice(None), [4, 2, 0, 3, 1]):
        assert len(kept(torch.tensor(EXACT)[order].tolist(), top_p=p)) == count


def test_ties() -> None:
    tied = [0.25, 0.25, 0.25, 0.125, 0.125]
    assert kept(tied, top_k=2) == [0, 1, 2]  # as in transformers, all tokens that equal the k-th largest logit stay
    assert len(kept(tied, top_p=0.5)) == 2
    assert len(kept(tied, top_p=1e-6)) == 1
    assert kept(tied, min_p=0.5) == [0, 1, 2, 3, 4]
    assert kept(tied, min_p=0.51) == [0, 1, 2]
    assert kept(tied, temperature=0.0) == kept(tied, temperature=1e-300) == [0]


def test_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    logits: Tensor = 2 * torch.randn(500, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for p in (0.3, 0.8, 0.95):
        mask = Sampler(Sampling(top_p=p)).probabilities(torch.empty(500, 0), logits) > 0
        chances = logits.softmax(-1)
        totals = (chances * mask).sum(1)
        least = chances.where(mask, 1.0).amin(1)
        assert (totals >= p - 1e-6).all()
        assert (totals - least < p + 1e-6).all()


@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        ("temperature", [0.0, 1e-38, 1e38], [-1e-9, -0.5, -1.0, float("inf"), float("nan")]),
        ("top_k", [1, 2], [0, -1]),
        ("top_p", [1e-9, 1.0], [0.0, -0.5, 1.001, 2.0, float("nan")]),
        ("min_p", [0.0, 1.0], [-0.1, float("nan")]),
        ("typical_p", [0.5], [0.0, 1.0]),
        ("repetition_penalty", [0.5], [0.0, float("inf")]),
        ("presence_penalty", [-0.5], [float("-inf"), float("nan")]),
        ("no_repeat_ngram", [1], [0, 1.5]),
        ("seed", [0, 2**63 - 1], [-1, 2**63]),
    ],
)
def test_options_out_of_range_raise(name: str, valid: list[float], invalid: list[float]) -> None:
    for value in valid:
        assert getattr(Sampling(**{name: value}), name) == value
    for value in invalid:
        with pytest.raises(UserError, match=f"{name}: give .*, not {value}"):
            Sampling(**{name: value})


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        ({}, False),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.5}, False),
        ({"temperature": 0.0, "top_k": 3, "min_p": 0.1}, True),
        ({"temperature": 0.0, "repetition_penalty": 1.5}, False),
        ({"temperature": 0.0, "presence_penalty": 0.5}, False),
        ({"presence_penalty": 0.5}, False),
    ],
)
def test_sampler_is_greedy_at_temperature_zero_without_penalties(options: dict[str, Any], greedy: bool) -> None:
    assert Sampler(Sampling(**options)).greedy is greedy


def test_extreme_values_lose_no_probability() -> None:
    logits = torch.tensor([[30.0, 29.0, 10.0], [-30.0, -40.0, -29.0]])
    ids = torch.empty(2, 0)
    assert Sampler(Sampling(temperature=1e-38)).probabilities(ids, logits).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert (Sampler(Sampling(top_p=1.0)).probabilities(ids, logits) > 0).all()  # although the sum reaches 1 early
    for k in (3, 4):
        torch.testing.assert_close(Sampler(Sampling(top_k=k)).probabilities(ids, logits), logits.softmax(1))


CHANCES = [0.05, 0.4, 0.15, 0.3, 0.1]


ENTROPY = -sum(p * math.log(p) for p in CHANCES)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, CHANCES),
        ({"temperature": 0.5}, [p**2 for p in CHANCES]),
        ({"top_k": 2}, [0, 0.4, 0, 0.3, 0]),
        ({"top_k": 9}, CHANCES),
        ({"top_p": 0.75}, [0, 0.4, 0.15, 0.3, 0]),
        ({"top_p": 0.1}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 0.4, 0, 0.3, 0]),  # 0.4 and 0.3 are 0.82 of the sum after top_k
        ({"min_p": 0.3}, [0, 0.4, 0.15, 0.3, 0]),
        ({"min_p": 0.36, "temperature": 2.0}, [0, *(p**0.5 for p in CHANCES[1:])]),  # √0.05 is 0.35 of √0.4
        ({"temperature": 1e-30}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        # logits are ln p + 3, all positive; tokens 1 and 3 occur in the text
        (
            {"repetition_penalty": 2.0},
            [p if t not in (1, 3) else (p * math.e**3) ** 0.5 / math.e**3 for t, p in enumerate(CHANCES)],
        ),
        ({"presence_penalty": 1.5}, [p if t not in (1, 3) else p * math.exp(-1.5) for t, p in enumerate(CHANCES)]),
        ({"no_repeat_ngram": 2}, [0.05, 0.4, 0.15, 0, 0.1]),  # the pair (1, 3) has occurred
        ({"no_repeat_ngram": 1, "temperature": 0.0}, [0, 0, 1, 0, 0]),
    ],
)
def test_probabilities_equal_hand_computed_values(options: dict[str, Any], weights: list[float]) -> None:
    texts, logits = torch.tensor([[1, 3, 1], [0, 4, 2]]), torch.tensor([CHANCES, CHANCES[::-1]]).log() + 3
    got = Sampler(Sampling(**options)).probabilities(texts, logits)  # the second row has other tokens and logits
    torch.testing.assert_close(got[0], torch.tensor(weights) / sum(weights), rtol=1e-5, atol=1e-7)


def test_typical_sampling_keeps_the_tokens_nearest_to_the_entropy() -> None:
    order = sorted(range(5), key=lambda t: abs(-math.log(CHANCES[t]) - ENTROPY))
    [got] = Sampler(Sampling(typical_p=0.5)).probabilities(torch.empty(1, 0), torch.tensor([CHANCES]).log())
    kept, total = [], 0.0
    while total < 0.5:
        kept.append(order[len(kept)])
        total += CHANCES[kept[-1]]
    assert got.nonzero().flatten().tolist() == sorted(kept)
    assert 1 not in kept[:1]  # the most probable token is not the most typical one here


def test_drawn_tokens_follow_the_probabilities() -> None:
    generators = [torch.Generator().manual_seed(0)] * 5000
    drawn = draw(torch.tensor(CHANCES).expand(5000, 5), generators).bincount(minlength=5)
    assert chi_square(drawn, torch.tensor(CHANCES)) < 23.5  # 4 degrees of freedom: exceeded once in 10,000


@pytest.mark.parametrize(
    "options", [{"min_p": 2.0}, {"typical_p": 1.5}, {"repetition_penalty": -1.0}, {"no_repeat_ngram": 0}]
)
def test_invalid_options_raise_one_line_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        Sampler(Sampling(**options))
    assert "\n" not in str(caught.value)
