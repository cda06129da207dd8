"""Generation with and without a cache, equal to one forward pass per token, and of several prompts at once."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fira import FIRA
from fira.errors import UserError
from fira.nn.context import Context, DecodingContext
from fira.nn.kv_cache import KVCache
from tests.fira.decoding.small_models import small
from tests.fira.small_model import CONFIG, make_model

FAMILIES = ["fira", "rish", "mooshak", "blues", "microrwkv"]


def most_probable(model: FIRA, tokens: list[int]) -> int:
    """Return the most probable token after the last `seq_len` tokens, from a full forward pass."""
    return int(model(torch.tensor([tokens[-CONFIG.seq_len :]]))[0, -1].argmax())


@pytest.mark.parametrize("prompt", [[5], [1, 2, 3], list(range(12)), list(range(30))])
def test_greedy_generation_equals_one_forward_per_token(prompt: list[int]) -> None:
    """Also beyond the end of the context, and for prompts that are longer than the context."""
    model, expected = make_model(), list(prompt)
    for _ in range(20):
        expected.append(most_probable(model, expected))
    assert model.generate([prompt], 20, temperature=0) == [expected]
    assert len(set(expected[len(prompt) :])) > 3


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9}])
def test_generation_is_the_same_without_the_cache(sampling: dict[str, float]) -> None:
    model = make_model()
    prompts = torch.randint(300, (2, 4), generator=torch.Generator().manual_seed(1))
    cached, plain = (
        model.generate(prompts, 25, seed=3, use_cache=use_cache, **sampling) for use_cache in (True, False)
    )
    assert cached.shape == (2, 29)
    assert torch.equal(cached, plain)
    assert torch.equal(cached[:, :4], prompts)
    assert not torch.equal(cached[0, 4:], cached[1, 4:])


def test_cache_reduces_each_forward_to_one_token() -> None:
    """The prompt is read once; then each forward has one token until the context is full."""
    model, widths, logits = make_model(), [], []
    model.layers[1].register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0].shape[1]))
    model.layers[-1].register_forward_hook(lambda _module, _inputs, output: logits.append(output.shape[1]))
    model.generate([1, 2, 3], 12, temperature=0)
    assert widths == [3, *[1] * 9, 12, 12]
    assert set(logits) == {1}


@pytest.mark.parametrize("pieces", [[12], [1, 11], [3, 4, 5], [11, 1]])
def test_cache_accepts_any_number_of_tokens(pieces: list[int]) -> None:
    model = make_model().double()
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))
    context = Context(decoding=DecodingContext(KVCache()))
    logits = torch.cat([model(some, context) for some in tokens.split(pieces, 1)], 1)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="context is 12"):
        model(tokens[:, :1], context)


def test_seed_determines_the_sampled_tokens() -> None:
    model = make_model()
    first, repeated, other = (model.generate([[1]], 30, seed=seed) for seed in (1, 1, 2))
    assert first == repeated != other


def test_result_has_the_type_of_the_prompt() -> None:
    model = make_model()
    row = model.generate(torch.tensor([1, 2]), 3, temperature=0)
    assert isinstance(row, Tensor)
    listed = row.tolist()
    assert model.generate([[1, 2], [1, 2]], 3, temperature=0) == [listed, listed]
    assert model.generate([1, 2], 3, temperature=0)[0].tolist() == listed
    assert model.generate(torch.tensor([[1, 2]]), 3, temperature=0).tolist() == [listed]
    assert model.generate([1, 2], 0).tolist() == [[1, 2]]


def test_generation_uses_no_dropout_and_restores_the_mode() -> None:
    model = make_model(replace(CONFIG, dropout=0.9))
    expected = model.generate([[4]], 10, temperature=0)
    assert model.train().generate([[4]], 10, temperature=0) == expected
    assert model.training
    assert not model(torch.tensor([[4]])).isnan().any()  # gradients are enabled as before
    assert model(torch.tensor([[4]])).requires_grad


def test_generation_ends_with_eos() -> None:
    model = make_model()
    unlimited = model.generate([[4], [9]], 10, temperature=0)
    eos = next(token for token in unlimited[0][2:] if token not in unlimited[1])
    end = unlimited[0].index(eos) + 1
    assert 2 < end < 11
    assert model.generate([[4], [9]], 10, temperature=0, eos=eos) == [
        unlimited[0][:end],
        unlimited[1],
    ]  # the other sequence continues
    filled = model.generate(torch.tensor([[4], [9]]), 10, temperature=0, eos=eos)
    assert filled.tolist() == [unlimited[0][:end] + [eos] * (11 - end), unlimited[1]]
    assert model.generate([[4]], 10, temperature=0, eos=eos) == [unlimited[0][:end]]


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "nothing to continue"),
        ([300], {}, "vocabulary of 300"),
        ([-1], {}, "vocabulary of 300"),
        ([1], {"temperature": -1.0}, "temperature: give"),
        ([1], {"temperature": math.nan}, "temperature: give"),
        ([1], {"top_k": 0}, "top_k: give"),
        ([1], {"top_p": 0.0}, "top_p: give"),
    ],
)
def test_invalid_arguments_raise(ids: list[int], options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_model().generate(ids, 3, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_unequal_prompts_equals_single_prompts(family: str) -> None:
    """With sampling, penalties over the whole text, and generation beyond the end of the context."""
    model = small(family)
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5], list(range(15))]
    sampling = {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2, "no_repeat_ngram": 3}
    batched = model.generate(prompts, 10, seed=7, **sampling)
    single = [model.generate([prompt], 10, seed=7 + row, **sampling)[0] for row, prompt in enumerate(prompts)]
    assert batched == single
    eos = single[0][9]  # the first row's third token
    ended = model.generate(prompts, 10, eos=eos, seed=7, **sampling)
    for row, (tokens, unlimited) in enumerate(zip(ended, single, strict=True)):
        new = unlimited[len(prompts[row]) :]
        assert tokens == prompts[row] + (new[: new.index(eos) + 1] if eos in new else new)
