"""What can be asked for by name: presets, their recipes, and models by what a config.json says."""

import sys
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_type_hints

from fira.errors import UserError

from . import families
from .families import FAMILIES, make
from .language_model import LanguageModel


@dataclass(frozen=True)
class Recipe:
    """How long a preset is trained, and its learning rate: linear warm-up to lr, then a cosine to min_lr."""

    steps: int
    lr: float
    min_lr: float
    warmup: int
    batch_size: int = 16


_FILES = [sys.modules[config.__module__] for _, config in FAMILIES.values()]  # each has its presets and recipes too
RECIPES = {name: Recipe(*values) for file in _FILES for name, values in file.RECIPES.items()}
PRESETS: dict[str, Any] = {name: preset for file in _FILES for name, preset in file.PRESETS.items()}


def make_config(preset: str, changes: dict[str, Any]) -> Any:
    """The config of a preset with some fields changed."""
    if preset not in PRESETS:
        raise UserError(f"--model {preset}: no such preset; choose from {', '.join(PRESETS)}")
    return change(PRESETS[preset], preset, changes)


def change(config: Any, name: str, changes: dict[str, Any]) -> Any:
    """The config of the model called `name` with some fields changed."""
    known = {f.name for f in fields(config)}
    if unknown := set(changes) - known:
        raise UserError(f"{name} has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    kinds = get_type_hints(type(config))
    for field, value in changes.items():
        allowed = get_args(kinds[field]) or (kinds[field],)
        if type(value) not in allowed and not (type(value) is int and float in allowed):
            raise UserError(f"{field}={value}: {field} is {' or '.join(kind.__name__ for kind in allowed)}; give that")
    return replace(config, **changes)


def build(config: Any) -> LanguageModel:
    """The model of a config, on the current default device (`with torch.device("meta")` for an empty one)."""
    try:
        return make(config)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def from_document(document: dict[str, Any]) -> Any:
    """The config that a config.json describes, as `families.to_document` did."""
    try:
        return families.from_document(document)
    except ValueError as error:
        raise UserError(f"config.json: {error}") from None
