"""The model families by name. Adding a family adds its file and a line here."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fira.errors import UserError
from fira.models import fira
from fira.models.language_model import LanguageModel

FAMILIES: dict[str, tuple[Callable[[Any], LanguageModel], type, dict[str, Any]]] = {
    "fira": (fira.FIRA, fira.FiraConfig, fira.PRESETS),
}


@dataclass(frozen=True)
class Recipe:
    """How long a preset is trained, and its learning rate: linear warm-up to lr, then a cosine to min_lr."""

    steps: int
    lr: float
    min_lr: float
    warmup: int


RECIPES = {name: Recipe(*values) for name, values in fira.RECIPES.items()}
PRESETS = {name: preset for _, _, presets in FAMILIES.values() for name, preset in presets.items()}


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
    model = next(model for model, kind, _ in FAMILIES.values() if kind is type(config))
    try:
        return model(config)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def to_document(config: Any) -> dict[str, Any]:
    """A config as JSON-able values, with its family's name."""
    family = next(name for name, (_, kind, _) in FAMILIES.items() if kind is type(config))
    return {"family": family, **asdict(config)}


def from_document(document: dict[str, Any]) -> Any:
    """The inverse of `to_document`."""
    values = dict(document)
    family = values.pop("family", None)
    if family not in FAMILIES:
        raise UserError(f"config.json: unknown model family {family!r}; known: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family][1](**values)
    except TypeError as error:
        raise UserError(f"config.json does not describe a {family}: {error}") from None
