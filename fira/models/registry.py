"""All model families, and what can be looked up in them: presets, recipes, and models by their config.json."""

from dataclasses import asdict, fields, replace
from typing import Any, get_args, get_type_hints

from fira.errors import UserError
from fira.models.blues import FAMILY as BLUES
from fira.models.family import Family, Recipe
from fira.models.fira import FAMILY as FIRA
from fira.models.language_model import LanguageModel
from fira.models.microrwkv import FAMILY as MICRORWKV
from fira.models.mooshak import FAMILY as MOOSHAK
from fira.models.rish import FAMILY as RISH

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        FIRA,
        RISH,
        MOOSHAK,
        BLUES,
        MICRORWKV,
    )
}
PRESETS: dict[str, Any] = {name: config for family in FAMILIES.values() for name, config in family.presets.items()}
RECIPES: dict[str, Recipe] = {name: recipe for family in FAMILIES.values() for name, recipe in family.recipes.items()}


def family_of(config: Any) -> Family:
    """The family that a config belongs to."""
    return next(family for family in FAMILIES.values() if family.config is type(config))


def make_config(preset: str, changes: dict[str, Any]) -> Any:
    """The config of a preset with some fields changed. Raises UserError for an unknown preset or field."""
    if preset not in PRESETS:
        raise UserError(f"--model {preset}: no such preset; choose from {', '.join(PRESETS)}")
    return change(PRESETS[preset], preset, changes)


def change(config: Any, name: str, changes: dict[str, Any]) -> Any:
    """The config of the model called `name` with some fields changed. Raises UserError for an unknown field or type."""
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
    """The model of a config on the current default device (`with torch.device("meta")` for an empty one).

    Raises UserError where the config's values contradict each other.
    """
    try:
        return family_of(config).model(config)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def to_document(config: Any) -> dict[str, Any]:
    """A config as JSON-able values, with the name of its family."""
    return {"family": family_of(config).name, **asdict(config)}


def from_document(document: dict[str, Any]) -> Any:
    """The config that `to_document` described. Raises UserError for an unknown family or field."""
    values = dict(document)
    family = values.pop("family", None)
    if family not in FAMILIES:
        raise UserError(f"config.json: unknown model family {family!r}; known: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family].config(**values)
    except TypeError as error:
        raise UserError(f"config.json: it does not describe a {family}: {error}") from None
