"""Record of a model family: its model class, config, presets, training recipes and properties."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the language model imports torch, which flags are parsed without
    from fira.models.language_model import LanguageModel


@dataclass(frozen=True)
class Recipe:
    """Default training settings of a preset.

    steps: number of optimizer steps. lr: peak learning rate, reached after `warmup` steps. min_lr: learning rate at the
    end of the decay. batch_size: number of sequences in the global batch. optimizer: see `OptimizerSettings`.
    lr_schedule: see `learning_rate`. embedding_lr_scale, router_lr_scale: see `OptimizerSettings`.
    """

    steps: int
    lr: float
    min_lr: float
    warmup: int
    batch_size: int = 16
    optimizer: str = "adamw"
    lr_schedule: str = "cosine"
    embedding_lr_scale: float = 1.0
    router_lr_scale: float = 1.0


# The settings of the -tiny presets, see benchmarks/time_to_loss.
TINY = Recipe(
    steps=500,
    lr=4e-2,
    min_lr=8e-4,
    warmup=20,
    optimizer="muon",
    lr_schedule="linear",
    embedding_lr_scale=3.0,
    router_lr_scale=0.2,
)


@dataclass(frozen=True)
class Family:
    """A model family. The file of a family ends with its record, `FAMILY`.

    name: the family's name in config.json. model: builds the model from a config. config: the config's dataclass.
    presets: configs by the name that `--model` accepts. recipes: the training settings of each preset.
    tied: the head shares the embedding's weight. A field `tied` of the config overrides it.
    recurrent: the model keeps a state of constant size per sequence, from which past tokens cannot be removed.
    from_original: converts fields with the names of the family's original code, which may be mixed with Fira's names.
    """

    name: str
    model: "Callable[[Any], LanguageModel]"
    config: type
    presets: Mapping[str, Any]
    recipes: Mapping[str, Recipe]
    tied: bool = False
    recurrent: bool = False
    from_original: Callable[[Mapping[str, Any]], dict[str, Any]] = dict

    def is_tied(self, config: Any) -> bool:
        """Whether the model of this config shares the embedding's weight with the head."""
        return getattr(config, "tied", self.tied)
