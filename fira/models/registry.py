"""The model families by name. Adding a family adds its file and a line here."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from types import ModuleType
from typing import Any

from fira.errors import UserError

from . import blues, fira, microrwkv, mooshak, rish
from .language_model import LanguageModel

# The file of each family, which has PRESETS and RECIPES, its model and its config.
FAMILIES: dict[str, tuple[ModuleType, Callable[[Any], LanguageModel], type]] = {
    "fira": (fira, fira.FIRA, fira.FiraConfig),
    "rish": (rish, rish.Rish, rish.RishConfig),
    "mooshak": (mooshak, mooshak.Mooshak, mooshak.MooshakConfig),
    "blues": (blues, blues.Blues, blues.BluesConfig),
    "microrwkv": (microrwkv, microrwkv.MicroRWKV, microrwkv.MicroRWKVConfig),
}


@dataclass(frozen=True)
class Recipe:
    """How long a preset is trained, and its learning rate: linear warm-up to lr, then a cosine to min_lr."""

    steps: int
    lr: float
    min_lr: float
    warmup: int
    batch_size: int = 16


RECIPES = {name: Recipe(*values) for file, _, _ in FAMILIES.values() for name, values in file.RECIPES.items()}
PRESETS: dict[str, Any] = {name: preset for file, _, _ in FAMILIES.values() for name, preset in file.PRESETS.items()}


def make_config(preset: str, changes: dict[str, Any]) -> Any:
    """The config of a preset with some fields changed."""
    if preset not in PRESETS:
        raise UserError(f"--model {preset}: no such preset; choose from {', '.join(PRESETS)}")
    config = PRESETS[preset]
    known = {f.name for f in fields(config)}
    if unknown := set(changes) - known:
        raise UserError(f"{preset} has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return replace(config, **changes)


def build(config: Any) -> LanguageModel:
    """The model of a config, on the current default device (`with torch.device("meta")` for an empty one)."""
    model = next(model for _, model, kind in FAMILIES.values() if kind is type(config))
    try:
        return model(config)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def to_document(config: Any) -> dict[str, Any]:
    """A config as JSON-able values, with its family's name."""
    family = next(name for name, (_, _, kind) in FAMILIES.items() if kind is type(config))
    return {"family": family, **asdict(config)}


def from_document(document: dict[str, Any]) -> Any:
    """The inverse of `to_document`."""
    values = dict(document)
    family = values.pop("family", None)
    if family not in FAMILIES:
        raise UserError(f"config.json: unknown model family {family!r}; known: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family][2](**values)
    except TypeError as error:
        raise UserError(f"config.json does not describe a {family}: {error}") from None
