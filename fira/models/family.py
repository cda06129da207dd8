"""The record of a model family: everything that is known of it under its name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fira.models.language_model import LanguageModel


@dataclass(frozen=True)
class Recipe:
    """How long a preset is trained, with which batch size and learning rate.

    steps: optimizer steps. lr: peak learning rate, reached after `warmup` steps. min_lr: learning rate at the last step
    of the cosine decay. batch_size: sequences in the global batch.
    """

    steps: int
    lr: float
    min_lr: float
    warmup: int
    batch_size: int = 16


@dataclass(frozen=True)
class Family:
    """A model family. Each file of this folder that defines one ends with its record, `FAMILY`.

    name: as it appears in config.json. model: builds the model of a config. config: the family's dataclass.
    presets: configs by the name that `--model` accepts. recipes: how each preset is trained.
    tied: the head's weight is the embedding's. A config with a field `tied` decides for itself.
    recurrent: the model keeps a state of fixed size per sequence, from which past tokens cannot be removed.
    """

    name: str
    model: Callable[[Any], LanguageModel]
    config: type
    presets: Mapping[str, Any]
    recipes: Mapping[str, Recipe]
    tied: bool = False
    recurrent: bool = False

    def is_tied(self, config: Any) -> bool:
        """Whether the model of this config computes logits with its embedding."""
        return getattr(config, "tied", self.tied)
