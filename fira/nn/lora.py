"""Settings of low-rank adapters, and the names of their parameters. The layers are in `lora_linear`.

This module does not import torch, so that the flags of training can be parsed without it.
"""

from argparse import ArgumentTypeError
from dataclasses import dataclass

from fira.errors import UserError
from fira.value_types import Positive, Size, flag_type

# Modules name the target that their linear layers or matrices belong to in the attribute `lora_target`.
TARGETS = ("attention", "experts", "head")
FORM = "rank=8,alpha=16,targets=attention+experts+head"


@dataclass(frozen=True)
class Lora:
    """Settings of the adapters. targets: the modules whose matrices have adapters, in the order of TARGETS."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Parse a text such as FORM. Raises UserError if it is invalid."""
        items = [item.partition("=")[::2] for item in text.split(",")]
        values = dict(items)
        if len(values) < len(items) or values.keys() != {"rank", "alpha", "targets"}:
            raise UserError(f"--lora {text:.80}: give rank, alpha and targets once each, as in {FORM}")
        targets = values["targets"].split("+")
        if unknown := [target for target in targets if target not in TARGETS]:
            raise UserError(f"--lora {text:.80}: no target {unknown[0]!r}; the targets are {', '.join(TARGETS)}")
        try:
            rank, alpha = flag_type(Size)(values["rank"]), flag_type(Positive)(values["alpha"])
        except ArgumentTypeError as error:
            raise UserError(f"--lora {text:.80}: {error}") from None
        return cls(rank, alpha, tuple(target for target in TARGETS if target in targets))

    def __str__(self) -> str:
        return f"rank={self.rank},alpha={self.alpha:g},targets={'+'.join(self.targets)}"

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank


def adapter_names(weight: str) -> tuple[str, str]:
    """Return the global names of the matrices A and B of a weight's adapter."""
    path, _, name = weight.rpartition(".")
    adapter = "lora_{}.weight" if name == "weight" else f"lora.{name}.{{}}"
    return f"{path}.{adapter.format('a')}", f"{path}.{adapter.format('b')}"
