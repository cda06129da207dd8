"""Each way to choose a token by hand, batches against their rows, a draft's guesses against the model alone."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fira.decoding.decoding import continuation
from fira.decoding.sampling import Sampler, Sampling, draw
from fira.errors import UserError
from fira.generation.beams import beam_search
from fira.generation.speculative import speculate
from fira.models.registry import PRESETS, build
from fira.nn.context import Context

CHANCES = [0.05, 0.4, 0.15, 0.3, 0.1]
ENTROPY = -sum(p * math.log(p) for p in CHANCES)
FAMILIES = ["fira", "rish", "mooshak", "blues", "microrwkv"]


def small(family: str, **changes: Any) -> Any:
    """A model of a family whose next token depends much on those before, in double precision."""
    sizes = {"vocab_size": 50, "seq_len": 12, "d_model": 16, "n_head": 2, "num_layers": 2}
    sizes |= {"n_kv_head": 1} if family in ("rish", "blues") else {}
    sizes |= {"d_moe": 8, "window": 4} if family == "microrwkv" else {"d_ff": 24}
    torch.manual_seed(0)
    model = build(replace(PRESETS[f"{family}-tiny"], **sizes | changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model.eval()


# One token


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, CHANCES),
        ({"temperature": 0.5}, [p**2 for p in CHANCES]),
        ({"top_k": 2}, [0, 0.4, 0, 0.3, 0]),
        ({"top_k": 9}, CHANCES),
        ({"top_p": 0.75}, [0, 0.4, 0.15, 0.3, 0]),
        ({"top_p": 0.1}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 0.4, 0, 0.3, 0]),  # of what top_k leaves, 0.4 and 0.3 are 0.82
        ({"min_p": 0.3}, [0, 0.4, 0.15, 0.3, 0]),
        ({"min_p": 0.36, "temperature": 2.0}, [0, *(p**0.5 for p in CHANCES[1:])]),  # √0.05 is 0.35 of √0.4
        ({"temperature": 1e-30}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        # logits are ln p + 3, all positive; tokens 1 and 3 are in the text
        (
            {"repetition_penalty": 2.0},
            [p if t not in (1, 3) else (p * math.e**3) ** 0.5 / math.e**3 for t, p in enumerate(CHANCES)],
        ),
        ({"presence_penalty": 1.5}, [p if t not in (1, 3) else p * math.exp(-1.5) for t, p in enumerate(CHANCES)]),
        ({"no_repeat_ngram": 2}, [0.05, 0.4, 0.15, 0, 0.1]),  # 1 3 has been
        ({"no_repeat_ngram": 1, "temperature": 0.0}, [0, 0, 1, 0, 0]),
    ],
)
def test_tokens_have_the_probabilities_they_should_have(options: dict[str, Any], weights: list[float]) -> None:
    texts, logits = torch.tensor([[1, 3, 1], [0, 4, 2]]), torch.tensor([CHANCES, CHANCES[::-1]]).log() + 3
    got = Sampler(Sampling(**options)).probabilities(texts, logits)  # the second row is another one's business
    torch.testing.assert_close(got[0], torch.tensor(weights) / sum(weights), rtol=1e-5, atol=1e-7)


def test_typical_tokens_are_those_nearest_to_the_entropy() -> None:
    order = sorted(range(5), key=lambda t: abs(-math.log(CHANCES[t]) - ENTROPY))
    [got] = Sampler(Sampling(typical_p=0.5)).probabilities(torch.empty(1, 0), torch.tensor([CHANCES]).log())
    kept, total = [], 0.0
    while total < 0.5:
        kept.append(order[len(kept)])
        total += CHANCES[kept[-1]]
    assert got.nonzero().flatten().tolist() == sorted(kept)
    assert 1 not in kept[:1]  # the likeliest is not the most typical here


def test_tokens_are_drawn_as_often_as_they_should_be() -> None:
    generators = [torch.Generator().manual_seed(0)] * 5000
    drawn = draw(torch.tensor(CHANCES).expand(5000, 5), generators).bincount(minlength=5)
    assert chi_square(drawn, torch.tensor(CHANCES)) < 23.5  # 4 degrees of freedom: once in 10,000


def chi_square(counts: Tensor, chances: Tensor) -> float:
    expected = chances.double() * counts.sum()
    assert expected.min() > 3
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "options", [{"min_p": 2.0}, {"typical_p": 1.5}, {"repetition_penalty": -1.0}, {"no_repeat_ngram": 0}]
)
def test_what_transformers_refuses_is_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        Sampler(Sampling(**options))
    assert "\n" not in str(caught.value)


# Batches


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_unequal_length_are_continued_as_alone(family: str) -> None:
    """Sampled, with penalties that look at the whole text, and past the end of the context."""
    model = small(family)
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5], list(range(15))]
    sampling = {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2, "no_repeat_ngram": 3}
    together = model.generate(prompts, 10, seed=7, **sampling)
    alone = [model.generate(prompt, 10, seed=7 + row, **sampling) for row, prompt in enumerate(prompts)]
    assert together == alone
    eos = alone[0][9]  # the first row's third token
    ended = model.generate(prompts, 10, eos=eos, seed=7, **sampling)
    for row, (one, whole) in enumerate(zip(ended, alone, strict=True)):
        new = whole[len(prompts[row]) :]
        assert one == prompts[row] + (new[: new.index(eos) + 1] if eos in new else new)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_beams_as_tokens_find_the_likeliest_pair(family: str) -> None:
    model = small(family)
    first = model(torch.tensor([[3, 1]]))[0, -1].log_softmax(-1)
    second = model(torch.tensor([[3, 1, token] for token in range(50)]))[:, -1].log_softmax(-1)
    assert beam_search(model, [3, 1], 2, 50, eos=49) == list(divmod(int((first[:, None] + second).argmax()), 50))


# Drafts


def new_tokens(model: Any, prompt: list[int], count: int, eos: int | None = None, **sampling: Any) -> list[int]:
    return [new[0] for new in continuation(model, [prompt], count, Sampling(**sampling), eos)]


@pytest.mark.parametrize("family", ["fira", "rish", "mooshak", "blues"])
def test_a_draft_does_not_change_what_is_likeliest(family: str) -> None:
    """Whatever it guesses, also past the end of either's context."""
    model, options = small(family), Sampling(temperature=0)
    weaker = small(family, num_layers=1)
    for draft in (weaker, model, small("fira", seq_len=7)):
        for prompt in ([3], [1, 4, 1, 5]):
            plain = new_tokens(model, prompt, 25, temperature=0)
            assert list(speculate(model, draft, prompt, 25, options, ahead=3)) == plain
    eos = plain[4]
    end = plain.index(eos) + 1
    assert list(speculate(model, weaker, prompt, 25, options, eos)) == plain[:end]


def test_a_good_draft_saves_reading() -> None:
    """With itself as its draft a model reads four guesses and one token more at a time."""
    model, widths = small("mooshak"), []
    model.layers[1].register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0].shape[1]))
    assert len(list(speculate(model, small("mooshak"), [1, 2], 10, Sampling(temperature=0), ahead=4))) == 10
    assert widths == [6, 5]


class Chain(nn.Module):
    """A Markov chain over five tokens, which only looks like a language model."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=5, seq_len=100)
        self.logits = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)))

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        if context.decoding.cache is not None:
            context.decoding.cache.length += tokens.shape[1]
        return self.logits[tokens][:, -(context.decoding.logits_to_keep or 0) :]


def test_what_is_drawn_with_a_draft_has_the_models_distribution() -> None:
    """Pairs of tokens against the product of the chain's probabilities; the draft's own would fail by far."""
    model, draft = Chain(1), Chain(2)
    torch.manual_seed(0)
    counts = torch.zeros(5, 5)
    for _ in range(3000):
        first, second = speculate(model, draft, [2], 2, Sampling(temperature=1.3), ahead=1)  # type: ignore[arg-type]
        counts[first, second] += 1

    def pairs(chain: Chain) -> Tensor:
        chances = (chain.logits.detach() / 1.3).softmax(1)
        return chances[2][:, None] * chances

    assert chi_square(counts.flatten(), pairs(model).flatten()) < 59  # 24 degrees of freedom: once in 10,000
    assert chi_square(counts.flatten(), pairs(draft).flatten()) > 200


def test_a_draft_that_cannot_serve_is_one_line() -> None:
    with pytest.raises(UserError, match="different vocabularies"):
        list(speculate(small("fira"), small("fira", vocab_size=51), [1], 5, Sampling()))
    recurrent = small("microrwkv")
    with pytest.raises(UserError, match="generate without a draft"):
        list(speculate(recurrent, small("fira"), [1], 9, Sampling(temperature=0)))
