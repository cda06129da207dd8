"""The model families by name. Adding a family adds its file and a line here."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .blues import Blues, BluesConfig
from .fira import FIRA, FiraConfig
from .language_model import LanguageModel
from .microrwkv import MicroRWKV, MicroRWKVConfig
from .mooshak import Mooshak, MooshakConfig
from .rish import Rish, RishConfig

FAMILIES: dict[str, tuple[Callable[[Any], LanguageModel], type]] = {
    "fira": (FIRA, FiraConfig),
    "rish": (Rish, RishConfig),
    "mooshak": (Mooshak, MooshakConfig),
    "blues": (Blues, BluesConfig),
    "microrwkv": (MicroRWKV, MicroRWKVConfig),
}


def make(config: Any) -> LanguageModel:
    """The model of a config, on the current default device. ValueError where the config is no model's."""
    model = next(model for model, kind in FAMILIES.values() if kind is type(config))
    return model(config)


def to_document(config: Any) -> dict[str, Any]:
    """A config as JSON-able values, with its family's name."""
    family = next(name for name, (_, kind) in FAMILIES.items() if kind is type(config))
    return {"family": family, **asdict(config)}


def from_document(document: dict[str, Any]) -> Any:
    """The config that `to_document` described. ValueError where it is none."""
    values = dict(document)
    family = values.pop("family", None)
    if family not in FAMILIES:
        raise ValueError(f"unknown model family {family!r}; known: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family][1](**values)
    except TypeError as error:
        raise ValueError(f"it does not describe a {family}: {error}") from None
