"""Files that the stages of a recipe read and no earlier stage writes: they must exist before the first stage is run."""

from collections.abc import Iterator
from pathlib import Path

from fira.data.hub_datasets import parse_name
from fira.data.mixture import parse_mixture
from fira.errors import UserError
from fira.recipes.recipe_file import REFERENCE, Recipe

PATHS = ("init", "checkpoint", "teacher", "sample_prompts", "tasks_path")  # flags whose value is a file or a folder


def check_inputs(recipe: Recipe) -> None:
    """Raise UserError, which names the stage and the flag, for a file that does not exist.

    A value that may be a name instead, of a dataset, a tokenizer or a task, is accepted.
    """
    for stage in recipe.stages:
        for key, value in stage.flags.items():
            texts = value if isinstance(value, list) else [value]
            for path in (path for text in texts if isinstance(text, str) for path in _files(key, text)):
                if not REFERENCE.search(path) and not Path(path).exists():
                    raise UserError(f"{recipe.path}: stage {stage.name}: {key} {path}: no such file or folder")


def _files(key: str, text: str) -> Iterator[str]:
    """Yield the parts of a flag's value that can only be files."""
    if key in PATHS:
        yield text
    elif key == "data":
        yield from (source for source, _ in parse_mixture(text) if source and not parse_name(source))
    elif key == "tasks":
        yield from (part for part in text.split(",") if part.endswith(".jsonl"))
    elif key == "tokenizer" and text.endswith(".json"):
        yield text
