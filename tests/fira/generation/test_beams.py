"""Beam search against exhaustive search."""

import pytest
import torch

from fira.generation.beams import beam_search
from tests.fira.decoding.small_models import small

FAMILIES = ["fira", "rish", "mooshak", "blues", "microrwkv"]


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_with_a_beam_per_token_finds_the_most_probable_pair(family: str) -> None:
    model = small(family)
    first = model(torch.tensor([[3, 1]]))[0, -1].log_softmax(-1)
    second = model(torch.tensor([[3, 1, token] for token in range(50)]))[:, -1].log_softmax(-1)
    assert beam_search(model, [3, 1], 2, 50, eos=49) == list(divmod(int((first[:, None] + second).argmax()), 50))
