"""Options that the families with attention share. Each is off unless a preset says otherwise."""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any

from fira.value_types import NotNegative


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of configs.

    softcap: limit c of the logits, c · tanh(logits / c); 0: none.
    relu_squared: use max(x, 0)² as the activation of experts or MLP.
    value_embeddings: add an embedding of the token, times a learnt scalar, to the values of each attention layer.
    residual_scalars: multiply the residual stream by a learnt scalar at each residual connection.
    """

    softcap: NotNegative = 0.0
    relu_squared: bool = False
    value_embeddings: bool = False
    residual_scalars: bool = False


def with_options_of(stored: Any, config: Any, given: Collection[str]) -> Any:
    """A preset's config with the options of the checkpoint's config `stored`, except for those that flags have given.

    The preset may have been given options since the checkpoint was written, which may be of another family.
    """
    if not isinstance(config, Options) or type(stored) is not type(config):
        return config
    return replace(config, **{f.name: getattr(stored, f.name) for f in fields(Options) if f.name not in given})
