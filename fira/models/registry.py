"""The model families by name, with the presets, recipes and models that follow from them.

To add a family, write its file in this folder and add its record to FAMILIES. Only the help text of `--model` lists the
families as well, in fira/training/config.py.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, get_type_hints

from fira.errors import UserError
from fira.models.blues import FAMILY as BLUES
from fira.models.family import Family, Recipe
from fira.models.fira import FAMILY as FIRA
from fira.models.language_model import LanguageModel
from fira.models.microrwkv import FAMILY as MICRORWKV
from fira.models.mooshak import FAMILY as MOOSHAK
from fira.models.rish import FAMILY as RISH
from fira.value_types import check

FAMILIES: dict[str, Family] = {family.name: family for family in (FIRA, RISH, MOOSHAK, BLUES, MICRORWKV)}
PRESETS: dict[str, Any] = {name: config for family in FAMILIES.values() for name, config in family.presets.items()}
RECIPES: dict[str, Recipe] = {name: recipe for family in FAMILIES.values() for name, recipe in family.recipes.items()}


def family_of(config: Any) -> Family:
    """Return the family of a config."""
    return next(family for family in FAMILIES.values() if family.config is type(config))


def make_config(preset: str, changes: dict[str, Any]) -> Any:
    """Return the config of a preset with some fields changed. Raises UserError for an unknown preset or field."""
    if preset not in PRESETS:
        raise UserError(f"--model {preset}: no such preset; choose from {', '.join(PRESETS)}")
    return change(PRESETS[preset], preset, changes)


def change(config: Any, name: str, changes: dict[str, Any]) -> Any:
    """Return a copy of a config with some fields changed. Raises UserError for an unknown field or an invalid value.

    name: name of the model in error messages, for example the preset.
    """
    changes = family_of(config).from_original(changes)
    existing = {f.name for f in fields(config)}
    if unknown := set(changes) - existing:
        names, choices = ", ".join(sorted(unknown)), ", ".join(sorted(existing))
        raise UserError(f"{name} has no field {names}; its fields are {choices}")
    check_fields(type(config), changes, "--model-set")
    return replace(config, **changes)


def check_fields(kind: type, values: Mapping[str, Any], where: str) -> None:
    """Raise UserError if a field of the config class `kind` has a value that its type does not allow.

    where: precedes the field in the message.
    """
    hints = get_type_hints(kind, include_extras=True)
    for name, value in values.items():
        check(f"{where} {name}", value, hints[name])


def build(config: Any) -> LanguageModel:
    """Build the model of a config on torch's default device (`with torch.device("meta")`: without allocating weights).

    Raises UserError if the config's values are inconsistent.
    """
    try:
        return family_of(config).model(config)
    except (ValueError, ArithmeticError, RuntimeError) as error:  # RuntimeError: a tensor larger than any memory
        raise UserError(f"model: {str(error).partition(chr(10))[0]}") from None


def to_document(config: Any) -> dict[str, Any]:
    """Convert a config to a JSON object, with the name of its family under `family`."""
    return {"family": family_of(config).name, **asdict(config)}


def from_document(document: dict[str, Any]) -> Any:
    """Inverse of `to_document`. Raises UserError for an unknown family or field, or an invalid value."""
    values = dict(document)
    family = values.pop("family", None)
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"config.json: unknown model family {family!r:.40}; choose from {', '.join(FAMILIES)}")
    kind = FAMILIES[family].config
    if unknown := values.keys() - {f.name for f in fields(kind)}:
        raise UserError(f"config.json: a {family} model has no field {sorted(unknown)[0]!r:.40}; restore the file")
    check_fields(kind, values, "config.json:")
    return kind(**values)
