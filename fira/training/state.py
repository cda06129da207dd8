"""Save the state of a training run as a checkpoint, and restore it on any layout."""

import logging
from dataclasses import asdict
from operator import attrgetter
from typing import Any

import torch

from fira.checkpoint.merged_checkpoint import AdapterRecord, SavedModel
from fira.checkpoint.pretrained import read_weight, stored_config
from fira.checkpoint.ranks import this_rank
from fira.checkpoint.shard_index import TensorShard
from fira.checkpoint.shards import Checkpoint
from fira.checkpoint.writer import CheckpointWriter
from fira.data.corpus import Corpus
from fira.data.loader import TrainingBatches
from fira.data.tokenizer import TOKENIZER
from fira.errors import UserError
from fira.json_reader import array, check, integer, mapping, number, record, scalar
from fira.models.registry import to_document
from fira.parallel.parallelize import DistributedModel
from fira.parallel.param_shard import ParamShard
from fira.parallel.rank_shards import TABLE
from fira.posttraining.chat_corpus import ChatCorpus
from fira.training.config import EARLIER, TrainConfig
from fira.training.trainer import Trainer

MOMENTS = ("exp_avg", "exp_avg_sq")  # Muon has the first one only

STATE_SCHEMA = record(
    {
        "step": integer(),
        "updates": integer(),
        "loader": record({"consumed": integer()}),
        "loss_scale": record({"value": number(2**-100, 2**100), "good_steps": integer()}),
    },
    {  # not in checkpoints of earlier versions
        "settings": mapping(scalar),
        "history": record(
            {
                "losses": array(number()),
                "rollbacks": array(record(dict.fromkeys(("step", "restored", "first", "end"), integer()))),
            }
        ),
    },
)

logger = logging.getLogger(__name__)


def run_settings(config: TrainConfig, corpus: Corpus | ChatCorpus) -> dict[str, Any]:
    """Return the settings that determine the results, apart from the model and the tokenizer, which are stored whole.

    config: with the chosen precision and micro-batch size. `data` is the key of the corpus, the hash of its content.
    """
    names = ["micro_batch_size", "clip", "precision", "seed", "objective", "document_mask"]
    if config.recipe().lr_schedule == "wsd":
        names.append("lr_decay")
    if config.objective == "dpo":
        names += ["dpo_loss", "dpo_beta"]
    if config.objective == "distill":
        names += ["teacher_top_k", "distill_beta", "distill_temperature", "on_policy", "answer_tokens"]
    if config.objective == "grpo":
        names += ["group_size", "answer_after", "answer_tokens"]
    values = {name: getattr(config, name) for name in names}
    return {**asdict(config.recipe()), **asdict(config.optimizer_settings()), **values, "data": corpus.folder.name}


def check_settings(saved: Checkpoint, settings: dict[str, Any], override: bool) -> None:
    """Raise UserError if a checkpoint was written with other settings and `override` is false.

    The number of steps may change; the learning rate then follows the schedule of the new number, which is logged.
    """
    stored = _read_state(saved).get("settings", {})
    if stored:
        stored = EARLIER | stored
    different = {
        name: f"{name} is {stored[name]!s:.12} (here {value!s:.12})"
        for name, value in settings.items()
        if name in stored and stored[name] != value
    }
    if steps := different.pop("steps", None):
        logger.info("%s: the learning rate follows the schedule of the new number of steps", steps)
    if different and not override:
        raise UserError(
            f"{saved.folder} was written with other settings: {', '.join(different.values())}; "
            "give the same values, or add --override"
        )
    if different and this_rank() == 0:
        logger.warning("%s is continued with other settings: %s", saved.folder, ", ".join(different.values()))


def save(
    writer: CheckpointWriter,
    step: int,
    trainer: Trainer,
    loader: TrainingBatches,
    tokenizer: dict[str, bytes],
    settings: dict[str, Any],
    adapters: AdapterRecord | None = None,
) -> None:
    """Begin to write a checkpoint (collective): weights, moments, loader position, loss scale, config and tokenizer.

    tokenizer: the content of its files by name. settings: see `run_settings`. adapters: the record of a LoRA run, whose
    checkpoints contain no frozen weights. Dropout and data order are functions of
    the seed and the sequence number, so there is no random state to save.
    """
    mesh, optimizer = trainer.mesh, trainer.optimizer
    owned = [shard for shard in trainer.model.shards if trainer.owners.owns(shard)]
    buffers = trainer.model.buffers if mesh.dp_rank == 0 else []
    moments = [
        TensorShard(f"{moment}/{shard.name}", tensor, shard.start, shard.shape)
        for shard in owned
        for moment, tensor in zip(MOMENTS, optimizer.moments[shard.name], strict=False)
    ]
    state = {
        "step": step,
        "updates": optimizer.updates,
        "loader": {"consumed": loader.consumed},
        "loss_scale": trainer.scale.state_dict(),
        "history": trainer.history.state_dict(),
        "settings": settings,
    }
    documents = {"config": to_document(trainer.model.config), "state": state}
    if adapters:
        documents["lora"] = adapters.document()
    writer.start(
        step,
        weights=[TensorShard(shard.name, shard.parameter, shard.start, shard.shape) for shard in [*owned, *buffers]],
        optimizer=moments,
        documents=documents,
        files=tokenizer,
        layout={"pp": mesh.layout.pp, "dp": mesh.layout.dp, "ep": mesh.layout.ep},
    )


def restore(saved: Checkpoint, trainer: Trainer, loader: TrainingBatches, tokenizer: dict[str, bytes]) -> int:
    """Restore a checkpoint written on any layout, and return its step (collective).

    Raises UserError if it was written with another model or tokenizer.
    """
    _check_compatible(saved, trainer, tokenizer)
    state = _read_state(saved)
    load_weights(saved, trainer.model)
    _restore_moments(saved, state, trainer)
    saved.close()
    loader.consumed = state["loader"]["consumed"]
    trainer.scale.load_state_dict(state["loss_scale"])
    trainer.history.load_state_dict(state.get("history", {"losses": [], "rollbacks": []}))
    return saved.step


def _restore_moments(saved: Checkpoint, state: dict[str, Any], trainer: Trainer) -> None:
    """Restore the moments, or set all of them to zero if the checkpoint was written with another optimizer."""
    optimizer = trainer.optimizer
    stored, current = (EARLIER | state.get("settings", {}))["optimizer"], optimizer.settings.optimizer
    for shard in trainer.owners.updated:
        for moment, tensor in zip(MOMENTS, optimizer.moments[shard.name], strict=False):
            if stored == current:
                tensor.copy_(_read(saved, f"{moment}/{shard.name}", shard))
            else:
                tensor.zero_()
    optimizer.updates = state["updates"] if stored == current else 0
    if stored != current and this_rank() == 0:
        logger.warning("the moments start at zero: %s has those of %s, not of %s", saved.folder, stored, current)


def check_documents(saved: Checkpoint) -> None:
    """Raise UserError if the state or the model's config in a checkpoint is invalid, whatever its hash."""
    _read_state(saved)
    stored_config(saved)


def _read_state(saved: Checkpoint) -> dict[str, Any]:
    """The document `state` of a checkpoint. Raises UserError if it is invalid, or of another step."""
    state, path = saved.document("state"), saved.folder / "state.json"
    check(state, path, STATE_SCHEMA)
    if state["step"] != saved.step:
        raise UserError(f"{path} is of step {state['step']}, the checkpoint of step {saved.step}; restore the file")
    return state


@torch.no_grad()
def load_weights(saved: SavedModel, model: DistributedModel) -> None:
    """Load this rank's shards of the weights that are not frozen, written on any layout (collective).

    Of a vocabulary larger than the stored one, the last rows of embeddings and head keep their initial values. Raises
    UserError if the weights belong to another model.
    """
    tokens = min(stored_config(saved).vocab_size, model.config.vocab_size)
    tables = {TABLE, f"layers.{model.stages[-1][-1]}.project.weight", *model.value_tables()}
    for shard in filter(attrgetter("kept"), [*model.shards, *model.buffers]):
        if shard.name in tables:
            stored = read_weight(saved, shard.name, (tokens, *shard.shape[1:]))
            shard.parameter[:tokens].copy_(stored)
        else:
            shard.parameter.copy_(_read(saved, shard.name, shard))
    if model.tied:
        model.tied.share_value()


@torch.no_grad()
def load_frozen(base: SavedModel, model: DistributedModel) -> None:
    """Load this rank's shards of the frozen weights. Raises UserError if they belong to another model."""
    for shard in filter(attrgetter("kept"), model.frozen):
        shard.parameter.copy_(_read(base, shard.name, shard))


def _read(saved: SavedModel, name: str, shard: ParamShard) -> torch.Tensor:
    """The rows of a stored tensor that a shard holds."""
    if not shard.shape:
        return read_weight(saved, name, shard.shape)
    return read_weight(saved, name, shard.shape, shard.start, shard.start + len(shard.parameter))


def _check_compatible(saved: Checkpoint, trainer: Trainer, tokenizer: dict[str, bytes]) -> None:
    """Raise UserError if a checkpoint was written with another model config or another tokenizer."""
    stored = to_document(stored_config(saved))  # with defaults for fields newer than the checkpoint
    current = to_document(trainer.model.config)
    fields = current if stored["family"] == current["family"] else ["family"]  # families have different fields
    if different := [key for key in fields if stored[key] != current[key]]:
        values = ", ".join(f"{key} is {stored[key]} (here {current[key]})" for key in different)
        raise UserError(
            f"{saved.folder} is of another model: its {values}; give the flags it was trained with, or another --out"
        )
    if TOKENIZER in tokenizer and saved.has_file(TOKENIZER) and saved.file(TOKENIZER) != tokenizer[TOKENIZER]:
        raise UserError(f"{saved.folder} was trained with another tokenizer; give its {TOKENIZER} as --tokenizer")
