"""Rotary embedding."""

from dataclasses import replace

import torch

from fira.nn.context import Context, DecodingContext
from fira.nn.kv_cache import KVCache
from tests.fira.models.small_families import RISH, make_model, make_tokens


def test_cached_keys_are_rotated_with_the_dynamic_rotary_base() -> None:
    """This is exact for one layer. Inputs of deeper layers were computed with the base of a shorter text."""
    model, tokens = make_model(replace(RISH, num_layers=1)), make_tokens(RISH, length=20)
    assert tokens.shape[1] > 2 * RISH.max_position
    cache = KVCache()
    with torch.no_grad():
        logits = [
            model(tokens[:, t : t + 1], Context(decoding=DecodingContext(cache)))[:, -1] for t in range(tokens.shape[1])
        ]
        torch.testing.assert_close(logits[-1], model(tokens, Context())[:, -1], rtol=1e-10, atol=1e-10)
