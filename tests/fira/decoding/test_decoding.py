"""Continuation of several prompts at once."""

import pytest

from tests.fira.decoding.small_models import small

FAMILIES = ["fira", "rish", "mooshak", "blues", "microrwkv"]


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_unequal_prompts_equals_single_prompts(family: str) -> None:
    """With sampling, penalties over the whole text, and generation beyond the end of the context."""
    model = small(family)
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5], list(range(15))]
    sampling = {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2, "no_repeat_ngram": 3}
    batched = model.generate(prompts, 10, seed=7, **sampling)
    single = [model.generate(prompt, 10, seed=7 + row, **sampling) for row, prompt in enumerate(prompts)]
    assert batched == single
    eos = single[0][9]  # the first row's third token
    ended = model.generate(prompts, 10, eos=eos, seed=7, **sampling)
    for row, (tokens, unlimited) in enumerate(zip(ended, single, strict=True)):
        new = unlimited[len(prompts[row]) :]
        assert tokens == prompts[row] + (new[: new.index(eos) + 1] if eos in new else new)
