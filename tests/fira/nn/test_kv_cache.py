"""Decoding with a cache equals recomputation."""

from dataclasses import replace

import torch

from fira.nn.context import Context, DecodingContext
from fira.nn.kv_cache import KVCache
from tests.fira.models.small_families import CONFIGS, SMALL, families, make_model, make_tokens


@families
def test_decoding_with_cache_equals_recomputation(name: str) -> None:
    """Decode in steps of different lengths, beyond the attention's window, and with a copy of the cache."""
    changes = {"max_position": SMALL["seq_len"]} if name.startswith("rish") else {}
    model, tokens = make_model(replace(CONFIGS[name], **changes)), make_tokens(CONFIGS[name], length=20)
    cache = KVCache()
    with torch.no_grad():
        steps = [3, 4, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1]
        end = 0
        for step in steps:
            logits = model(tokens[:, end : end + step], Context(decoding=DecodingContext(cache)))
            end += step
            expected = model(tokens[:, :end], Context())[:, -1]
            torch.testing.assert_close(logits[:, -1], expected, rtol=1e-10, atol=1e-10)
            previous, cache = cache, KVCache()
            cache.length, cache.states = previous.length, {key: value.clone() for key, value in previous.states.items()}
        assert end == tokens.shape[1]
    greedy, plain = (model.generate(tokens[:, :5], 25, temperature=0, use_cache=cached) for cached in (True, False))
    assert torch.equal(greedy, plain)
