"""The base model of a LoRA run: that of --init for a new run, and the one named in the checkpoint for a resumed run."""

from dataclasses import dataclass

from fira.checkpoint.merged_checkpoint import LORA, AdapterRecord, SavedModel
from fira.checkpoint.pretrained import with_base
from fira.checkpoint.shards import Checkpoint
from fira.errors import UserError
from fira.nn.lora import Lora


@dataclass(frozen=True)
class AdaptedModel:
    """A base model, and the record of its adapters that is stored in every checkpoint."""

    base: SavedModel
    record: AdapterRecord


def open_base(lora: Lora | None, init: SavedModel | None, resumed: Checkpoint | None) -> AdaptedModel | None:
    """Return the base model and the record of its adapters (collective); None for a run without adapters.

    init: the opened model of --init. Raises UserError if the checkpoint `resumed` has other adapters, or if its base
    model is missing or has changed.
    """
    if resumed is None:
        return AdaptedModel(init, AdapterRecord.of(lora, init)) if lora and init else None
    stored = AdapterRecord.read(resumed) if resumed.has_file(LORA) else None
    if (stored and stored.lora) != lora:
        trained = f"with --lora {stored.lora}" if stored else "without --lora"
        raise UserError(f"{resumed.folder} was trained {trained}; give the flags it was trained with, or another --out")
    return AdaptedModel(with_base(resumed).base, stored) if stored else None
