"""The decoding state of microrwkv, and the names of fields in its original code."""

from typing import Any

import pytest

from fira.errors import UserError
from fira.models.microrwkv import MicroRWKV
from fira.models.registry import PRESETS, make_config
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


TABLE: dict[str, Any] = {  # of the original README, for ckpt-500
    **{"block_size": 1024, "vocab_size": 50304, "n_layer": 8, "n_head": 8, "n_embd": 768},
    **{"num_experts": 4, "num_active_experts": 4, "expert_dim": 512, "dim": 768, "dropout": 0.0, "bias": False},
}


def test_names_of_the_original_code() -> None:
    assert make_config("microrwkv-tiny", TABLE | {"n_group": 4, "window": 256}) == PRESETS["microrwkv-base"]
    small = {"block_size": 8, "n_embd": 12, "n_head": 2, "n_group": 1, "n_layer": 1, "expert_dim": 5, "vocab_size": 11}
    config = MicroRWKV(**small).config
    assert (config.seq_len, config.d_model, config.num_layers, config.d_moe) == (8, 12, 1, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, r"dropout is always 0\.0"),
        ({"bias": True}, "bias is always false"),
        ({"n_embd": 8, "dim": 16}, "n_embd and dim are both d_model, and differ"),
        ({"expert_dim": 20, "d_moe": 30}, "expert_dim makes d_moe 24, which differs"),
        ({"expert_dim": "wide"}, "expert_dim: give an integer"),
        ({"n_layers": 2}, "no field n_layers"),
    ],
)
def test_values_that_the_model_does_not_have_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config("microrwkv-tiny", changes)
