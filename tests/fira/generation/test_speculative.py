"""Speculative decoding against the model without a draft."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fira.decoding.decoding import continuation
from fira.decoding.sampling import Sampling
from fira.errors import UserError
from fira.generation.speculative import speculate
from fira.nn.context import Context
from tests.fira.decoding.small_models import chi_square, small


def new_tokens(model: Any, prompt: list[int], count: int, eos: int | None = None, **sampling: Any) -> list[int]:
    return [new[0] for new in continuation(model, [prompt], count, Sampling(**sampling), eos)]


@pytest.mark.parametrize("family", ["fira", "rish", "mooshak", "blues"])
def test_greedy_speculative_decoding_equals_greedy_decoding(family: str) -> None:
    """With a weaker draft, the model itself as its draft, and a draft with a shorter context."""
    model, options = small(family), Sampling(temperature=0)
    weaker = small(family, num_layers=1)
    for draft in (weaker, model, small("fira", seq_len=7)):
        for prompt in ([3], [1, 4, 1, 5]):
            plain = new_tokens(model, prompt, 25, temperature=0)
            assert list(speculate(model, draft, prompt, 25, options, ahead=3)) == plain
    eos = plain[4]
    end = plain.index(eos) + 1
    assert list(speculate(model, weaker, prompt, 25, options, eos)) == plain[:end]


def test_accepted_tokens_reduce_the_number_of_forwards() -> None:
    """With the model itself as its draft, each forward verifies four proposed tokens and yields a fifth."""
    model, widths = small("mooshak"), []
    model.layers[1].register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0].shape[1]))
    assert len(list(speculate(model, small("mooshak"), [1, 2], 10, Sampling(temperature=0), ahead=4))) == 10
    assert widths == [6, 5]


class Chain(nn.Module):
    """A Markov chain over five tokens with the interface of a language model."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=5, seq_len=100)
        self.logits = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)))

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        if context.decoding.cache is not None:
            context.decoding.cache.length += tokens.shape[1]
        return self.logits[tokens][:, -(context.decoding.logits_to_keep or 0) :]


def test_speculative_sampling_has_the_distribution_of_the_model() -> None:
    """The frequencies of pairs of tokens follow the model's probabilities and differ from the draft's."""
    model, draft = Chain(1), Chain(2)
    torch.manual_seed(0)
    counts = torch.zeros(5, 5)
    for _ in range(3000):
        first, second = speculate(model, draft, [2], 2, Sampling(temperature=1.3), ahead=1)  # type: ignore[arg-type]
        counts[first, second] += 1

    def pairs(chain: Chain) -> Tensor:
        chances = (chain.logits.detach() / 1.3).softmax(1)
        return chances[2][:, None] * chances

    assert chi_square(counts.flatten(), pairs(model).flatten()) < 59  # 24 degrees of freedom: exceeded once in 10,000
    assert chi_square(counts.flatten(), pairs(draft).flatten()) > 200


def test_unsuitable_draft_raises_user_error() -> None:
    with pytest.raises(UserError, match="different vocabularies"):
        list(speculate(small("fira"), small("fira", vocab_size=51), [1], 5, Sampling()))
    recurrent = small("microrwkv")
    with pytest.raises(UserError, match="generate without a draft"):
        list(speculate(recurrent, small("fira"), [1], 9, Sampling(temperature=0)))
