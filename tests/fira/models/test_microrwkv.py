"""The decoding state of microrwkv."""

from fira.nn.context import Context, DecodingContext
from fira.nn.kv_cache import KVCache
from tests.fira.models.small_families import MICRORWKV, make_model, make_tokens


def test_recurrent_state_has_constant_size() -> None:
    """In the cache of microrwkv, only keys and values of grouped attention grow with the text."""
    model, tokens, sizes = make_model(MICRORWKV), make_tokens(MICRORWKV, length=20), []
    cache = KVCache()
    for t in range(tokens.shape[1]):
        model(tokens[:, t : t + 1], Context(decoding=DecodingContext(cache)))
        sizes.append({name: value.shape for name, value in cache.states.items() if ".grouped." not in name})
    assert sizes[-1] == sizes[10]
    assert (
        len([name for name in sizes[-1] if "time_mix" in name]) == 8
    )  # last token and state, for two calls in each of two layers
