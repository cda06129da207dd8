"""The training run that `tests.reference_training` computes independently, run on each rank of a test."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fira.checkpoint.pretrained import open_saved
from fira.data.loader import Loader, ValidationSequences
from fira.data.rows import Rows
from fira.data.text_windows import TextWindows
from fira.models.registry import from_document
from fira.nn.cross_entropy import IGNORE_INDEX
from fira.optim.lr_schedule import learning_rate
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.parallelize import DistributedModel, parallelize
from fira.training.state import load_weights
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, make_mesh
from tests.ranks.parity_ranks import meta_model
from tests.reference_training import Settings, token_ids


class Tokens:
    """Token ids as the loader reads them."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


class Labels(TextWindows):
    """Windows whose last token has no target, but is not padding, as with `labels=input_ids` in transformers."""

    def rows(self, numbers: Sequence[int], count: int) -> Rows:
        rows = super().rows(numbers, count)
        rows.targets[:, -1] = IGNORE_INDEX
        return rows._replace(documents=np.zeros_like(rows.tokens))


def train(
    model: dict[str, Any],
    settings: dict[str, Any],
    layout: list[int],
    dtype: str,
    microbatch: int,
    validation: int,
    exported: str | None = None,
) -> dict[str, Any]:
    """Return losses, norms and learning rates of each step, the final validation loss, and this rank's weights.

    validation: the number of validation tokens. "initial", "weights": by name, (first row, values).
    exported: train this model of transformers as its class would, with a constant learning rate.
    """
    torch.set_num_threads(1)
    config, s = from_document(model), Settings(**settings)
    mesh = make_mesh(Layout(*layout), range(layout[0]))
    built = parallelize(meta_model(config), mesh, 7, [CPU], "1f1b", getattr(torch, dtype))
    split = BatchSplit(microbatch, mesh.layout.dp, mesh.dp_rank, config.d_model)
    trainer = Trainer(built, mesh, split, "1f1b", OptimizerSettings(weight_decay=s.weight_decay), s.clip, fp16=False)
    ids = token_ids(config.vocab_size, s.windows * config.seq_len + 1)
    windows = (Labels if exported else TextWindows)(Tokens(ids), config.seq_len)  # type: ignore[arg-type]
    loader = Loader(windows, s.loader_seed)
    if exported:
        load_weights(open_saved(exported), built)
    initial, steps = _weights(built), []
    for step in range(1, s.steps + 1):
        lr = s.peak if exported else learning_rate(step, s.steps, s.peak, s.low, s.warmup)
        result = trainer.step(loader, s.batch, lr, 11, [])
        steps.append([result.loss, result.aux_loss, result.grad_norm, lr])
    held_out = ValidationSequences(
        TextWindows(Tokens(token_ids(config.vocab_size, validation)), config.seq_len, complete=False)
    )  # type: ignore[arg-type]
    loss = trainer.forward.mean(held_out, s.batch).loss
    return {"initial": initial, "steps": steps, "val_loss": loss, "weights": _weights(built)}


def _weights(built: DistributedModel) -> dict[str, Any]:
    return {part.name: (part.start, part.parameter.tolist()) for part in built.shards}


def train_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run several trainings in one job, because starting ranks takes longer than training."""
    return [train(**case) for case in cases]
