"""Checkpoints of adapters, read as the checkpoint of the model into which the adapters are merged.

    checkpoint of a LoRA run   lora.json, adapters, moments         ─┐
                                    │ base: folder, SHA-256          ├─ MergedCheckpoint.read(name) = W + α/r · B A
    base model                 weights, unchanged since training    ─┘

The checkpoint of a LoRA run has no weights of its base model. `lora.json` names the folder of the base, and the hash
of its config and weights; `fira.checkpoint.pretrained` opens and compares it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from fira.checkpoint.manifest import combined_hash
from fira.checkpoint.shards import Checkpoint
from fira.errors import UserError
from fira.json_reader import array, check, integer, number, record, text
from fira.nn.lora import TARGETS, Lora, adapter_names
from fira.value_types import LONGEST_PATH

LORA = "lora.json"
LORA_SCHEMA = record(
    {
        "rank": integer(1, 2**18),
        "alpha": number(0),
        "targets": array(text("|".join(TARGETS), f"one of {', '.join(TARGETS)}"), len(TARGETS)),
        "base": record(
            {"folder": text(f".{{1,{LONGEST_PATH}}}", "a path"), "sha256": text("[0-9a-f]{64}", "a SHA-256")}
        ),
    }
)


class SavedModel(Protocol):
    """A saved model: a checkpoint, a folder of transformers, or one of the two with merged adapters."""

    folder: Path

    def document(self, name: str) -> dict[str, Any]: ...

    def has_file(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor: ...

    def tensor_count(self) -> int: ...

    def weights_hash(self) -> str: ...


@dataclass(frozen=True)
class AdapterRecord:
    """The content of lora.json: settings, and folder and hash of the base model."""

    lora: Lora
    folder: str
    sha256: str

    @classmethod
    def of(cls, lora: Lora, base: SavedModel) -> Self:
        """Return the record of new adapters (collective). Raises UserError if the base model has adapters itself."""
        if isinstance(base, MergedCheckpoint):
            raise UserError(
                f"{base.folder} has adapters of its own; export the model, and give the exported folder as --init"
            )
        return cls(lora, str(base.folder.resolve()), base.weights_hash())

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Self:
        """Read the record of a checkpoint that has one. Raises UserError if it is invalid."""
        document, path = checkpoint.document("lora"), checkpoint.folder / LORA
        check(document, path, LORA_SCHEMA)
        lora = Lora(document["rank"], float(document["alpha"]), tuple(document["targets"]))
        return cls(lora, document["base"]["folder"], document["base"]["sha256"])

    def document(self) -> dict[str, Any]:
        base = {"folder": self.folder, "sha256": self.sha256}
        return {"rank": self.lora.rank, "alpha": self.lora.alpha, "targets": list(self.lora.targets), "base": base}

    def check_base(self, base: SavedModel, adapters: Path) -> None:
        """Raise UserError if a model is not the unchanged base model of the adapters in a folder (collective)."""
        if base.weights_hash() != self.sha256:
            raise UserError(
                f"{adapters}: its base model {self.folder} has changed since the adapters were trained; restore it, or "
                "train the adapters again"
            )


class MergedCheckpoint:
    """The model of a checkpoint of adapters, through the interface of Checkpoint: weights have the adapters merged.

    All weights are read in at least the precision of the adapters. adapters: the checkpoint. base: its base model.
    """

    def __init__(self, adapters: Checkpoint, base: SavedModel, adapter_record: AdapterRecord) -> None:
        self.adapters, self.base, self.record = adapters, base, adapter_record
        self.folder, self.step = adapters.folder, adapters.step
        self.document, self.has_file, self.file = adapters.document, adapters.has_file, adapters.file
        self.shape, self.tensor_count = base.shape, base.tensor_count
        self._dtype = adapters.precision()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop) of a tensor (default: all), with the adapter merged if it has one."""
        weight = self.base.read(name, start, stop)
        if weight.is_floating_point():
            weight = weight.to(torch.promote_types(weight.dtype, self._dtype))
        adapter = self.adapter(name, start, stop)
        if adapter is None:
            return weight
        a, b = adapter
        return weight + self.record.lora.scale * (b @ a)

    def adapter(self, name: str, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor] | None:
        """Read the matrices A and B of the adapter of rows [start, stop) of a weight; None if it has none."""
        a_name, b_name = adapter_names(name)
        if not self.adapters.has_tensor(a_name):
            return None
        shape, rank = self.shape(name), self.record.lora.rank
        shapes = (*shape[:-2], rank, *shape[-1:]), (*shape[:-1], rank)
        if len(shape) < 2 or (self.adapters.shape(a_name), self.adapters.shape(b_name)) != shapes:
            raise UserError(f"{self.folder}: {a_name} and {b_name} do not fit {name} of {self.base.folder}; restore it")
        # Rows of a matrix are its outputs, and have the same rows in B; rows of experts' weights are experts.
        a = self.adapters.read(a_name, start, stop) if len(shape) == 3 else self.adapters.read(a_name)
        return a, self.adapters.read(b_name, start, stop)

    def weights_hash(self) -> str:
        """Return a hash of the base model, the adapters and their settings."""
        hashes = {"adapters": self.adapters.weights_hash(), "base": self.record.sha256}
        return combined_hash(hashes | {"settings": str(self.record.lora)})
