"""The model families by name, with the presets, recipes and models that follow from them.

To add a family, write its file in this folder and import its record here; nothing else lists the families.
"""

# ruff: noqa: F401 (the imported records are collected in FAMILIES)
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

FAMILIES: dict[str, Family] = {record.name: record for record in list(globals().values()) if isinstance(record, Family)}
PRESETS: dict[str, Any] = {name: config for family in FAMILIES.values() for name, config in family.presets.items()}
RECIPES: dict[str, Recipe] = {name: recipe for family in FAMILIES.values() for name, recipe in family.recipes.items()}


def family_of(config: Any) -> Family:
    """The family that a config belongs to."""
    return next(family for family in FAMILIES.values() if family.config is type(config))


def make_config(preset: str, changes: dict[str, Any]) -> Any:
    """Config of a preset with some fields changed. Raises UserError for an unknown preset or field."""
    if preset not in PRESETS:
        raise UserError(f"--model {preset}: no such preset; choose from {', '.join(PRESETS)}")
    return change(PRESETS[preset], preset, changes)


def change(config: Any, name: str, changes: dict[str, Any]) -> Any:
    """Copy of a config with some fields changed. Raises UserError for an unknown field or a wrong type.

    name: the preset, or what else the error message calls the model.
    """
    known = {f.name for f in fields(config)}
    if unknown := set(changes) - known:
        raise UserError(f"{name} has no field {', '.join(sorted(unknown))}; its fields are {', '.join(sorted(known))}")
    kinds = get_type_hints(type(config))
    for field, value in changes.items():
        allowed = get_args(kinds[field]) or (kinds[field],)
        if type(value) not in allowed and not (type(value) is int and float in allowed):
            raise UserError(f"{field}={value}: {field} must be {' or '.join(kind.__name__ for kind in allowed)}")
    return replace(config, **changes)


def build(config: Any) -> LanguageModel:
    """Build the model of a config on torch's default device (`with torch.device("meta")`: without allocating weights).

    Raises UserError if the config's values are inconsistent.
    """
    try:
        return family_of(config).model(config)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def to_document(config: Any) -> dict[str, Any]:
    """A config as a JSON object, with the name of its family under `family`."""
    return {"family": family_of(config).name, **asdict(config)}


def from_document(document: dict[str, Any]) -> Any:
    """Inverse of `to_document`. Raises UserError for an unknown family or field."""
    values = dict(document)
    family = values.pop("family", None)
    if family not in FAMILIES:
        raise UserError(f"config.json: unknown model family {family!r}; known: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family].config(**values)
    except TypeError as error:
        raise UserError(f"config.json does not describe a {family} model: {error}") from None
