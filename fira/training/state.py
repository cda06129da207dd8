"""Save the state of a training run as a checkpoint, and restore it on any layout."""

import torch

from fira.checkpoint.pretrained import Saved
from fira.checkpoint.shard_index import TensorShard
from fira.checkpoint.shards import Checkpoint
from fira.checkpoint.writer import CheckpointWriter
from fira.data.loader import Loader
from fira.data.mixture import Mixture
from fira.data.tokenizer import TOKENIZER
from fira.errors import UserError
from fira.models.registry import from_document, to_document
from fira.parallel.parallelize import DistributedModel, ParamShard
from fira.training.trainer import Trainer

MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    writer: CheckpointWriter, step: int, trainer: Trainer, loader: Loader | Mixture, tokenizer: bytes | None
) -> None:
    """Begin to write a checkpoint (collective): weights, moments, loader position, loss scale, config and tokenizer.

    tokenizer: the content of tokenizer.json. Dropout and data order are functions of the seed and the sequence number,
    so there is no random state to save.
    """
    mesh, optimizer = trainer.mesh, trainer.optimizer
    owned = [shard for shard in trainer.model.shards if (mesh.edp_rank if shard.expert else mesh.dp_rank) == 0]
    buffers = trainer.model.buffers if mesh.dp_rank == 0 else []
    moments = [
        TensorShard(f"{moment}/{shard.name}", tensor, shard.start, shard.shape)
        for shard in owned
        for moment, tensor in zip(MOMENTS, optimizer.moments[shard.name], strict=True)
    ]
    state = {
        "step": step,
        "updates": optimizer.updates,
        "loader": {"consumed": loader.consumed},
        "loss_scale": trainer.scale.state_dict(),
        "history": trainer.history.state_dict(),
    }
    writer.start(
        step,
        weights=[TensorShard(shard.name, shard.parameter, shard.start, shard.shape) for shard in [*owned, *buffers]],
        optimizer=moments,
        documents={"config": to_document(trainer.model.config), "state": state},
        files={TOKENIZER: tokenizer} if tokenizer is not None else {},
        layout={"pp": mesh.layout.pp, "dp": mesh.layout.dp, "ep": mesh.layout.ep},
    )


def restore(saved: Checkpoint, trainer: Trainer, loader: Loader | Mixture, tokenizer: bytes | None) -> int:
    """Restore a checkpoint written on any layout, and return its step (collective).

    Raises UserError if it was written with another model or tokenizer.
    """
    _check_compatible(saved, trainer, tokenizer)
    state = saved.document("state")
    load_weights(saved, trainer.model)
    for shard in trainer.model.shards:
        for moment, tensor in zip(MOMENTS, trainer.optimizer.moments[shard.name], strict=True):
            tensor.copy_(_read(saved, f"{moment}/{shard.name}", shard))
    trainer.optimizer.updates = state["updates"]
    loader.consumed = state["loader"]["consumed"]
    trainer.scale.load_state_dict(state["loss_scale"])
    trainer.history.load_state_dict(state.get("history", {"losses": [], "rollbacks": []}))
    return saved.step


@torch.no_grad()
def load_weights(saved: Saved, model: DistributedModel) -> None:
    """Load this rank's shards of the weights, written on any layout (collective).

    Raises UserError if they belong to another model.
    """
    for shard in [*model.shards, *model.buffers]:
        shard.parameter.copy_(_read(saved, shard.name, shard))
    if model.tied:
        model.tied.share_value()


def _read(saved: Saved, name: str, shard: ParamShard) -> torch.Tensor:
    """The rows of a stored tensor that a shard holds; UserError if its global shape differs from the stored one."""
    if saved.shape(name) != shard.shape:
        raise UserError(f"{saved.folder}: {name} has shape {saved.shape(name)}, this model's is {shard.shape}")
    return saved.read(name, shard.start, shard.start + len(shard.parameter)) if shard.shape else saved.read(name)


def _check_compatible(saved: Checkpoint, trainer: Trainer, tokenizer: bytes | None) -> None:
    """Raise UserError if a checkpoint was written with another model config or another tokenizer."""
    stored = to_document(from_document(saved.document("config")))  # with defaults for fields newer than the checkpoint
    current = to_document(trainer.model.config)
    fields = current if stored["family"] == current["family"] else ["family"]  # families have different fields
    if different := [key for key in fields if stored[key] != current[key]]:
        values = ", ".join(f"{key} is {stored[key]} (here {current[key]})" for key in different)
        raise UserError(
            f"{saved.folder} is of another model: its {values}; give the flags it was trained with, or another --out"
        )
    if tokenizer is not None and saved.has_file(TOKENIZER) and saved.file(TOKENIZER) != tokenizer:
        raise UserError(f"{saved.folder} was trained with another tokenizer; give its {TOKENIZER} as --tokenizer")
