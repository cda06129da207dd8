"""A step on packed preferences with the log-probabilities of a reference, run on each rank of a test."""

from pathlib import Path
from typing import Any

import torch

from fira.checkpoint.pretrained import open_saved
from fira.data.loader import Loader
from fira.models.registry import from_document
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.gradients import gradient_of
from fira.parallel.parallelize import DistributedModel, parallelize
from fira.posttraining.dpo import PreferenceLoss
from fira.posttraining.packed_examples import PackedExamples
from fira.posttraining.preference_pairs import PreferencePairs
from fira.training.reference import answer_logs
from fira.training.state import load_weights
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, make_mesh
from pipeline.schedule import SCHEDULES
from tests.ranks.parity_ranks import meta_model

ORDER = 3  # seed of the order of the sequences


def train(
    model: dict[str, Any],
    layout: list[int],
    folder: str,
    loss: str,
    beta: float,
    microbatch: int,
    batch: int,
    dtype: str = "float64",
    schedule: str = "1f1b",
    weights: list[str] | None = None,
) -> dict[str, Any]:
    """Compute one step at the learning rate zero.

    model: the document of a config. folder: of the packed preferences. weights: the folders of the reference and of the
    model; by default both are drawn, from different seeds.
    Returns loss, auxiliary loss, gradient norm and metrics of the step; the log-probabilities of the reference; this
    rank's rows of the gradients by name, (first row, values), and on a single rank those of the weights of the
    reference and of the model.
    """
    torch.set_num_threads(1)
    config, kind = from_document(model), getattr(torch, dtype)
    mesh = make_mesh(Layout(*layout), SCHEDULES[schedule].placement(layout[0]), [CPU])
    objective = PreferenceLoss(loss, beta)
    split = BatchSplit(microbatch, mesh.layout.dp, mesh.dp_rank, config.d_model, None, kind, objective)

    def trainer(index: int) -> Trainer:
        built = parallelize(meta_model(config), mesh, 7 + index, [CPU], schedule, kind)
        if weights:
            load_weights(open_saved(weights[index]), built)
        return Trainer(built, mesh, split, schedule, OptimizerSettings(), clip=0.0, fp16=False)

    packed, reference, trained = PackedExamples(Path(folder), "train-0", config.seq_len), trainer(0), trainer(1)
    logs = answer_logs(reference.forward, packed, batch, lambda _: None)
    loader: Any = Loader(PreferencePairs(packed, logs), ORDER)
    result = trained.step(loader, batch, lr=0.0, seed=11)
    return {
        "step": [result.loss, result.aux_loss, result.grad_norm, *result.metrics.values()],
        "metrics": [*result.metrics],
        "logs": logs.tolist(),
        "gradients": {shard.name: (shard.start, gradient_of(shard).tolist()) for shard in trained.model.shards},
        **({"reference": rows_of(reference.model), "model": rows_of(trained.model)} if layout == [1, 1, 1] else {}),
    }


def rows_of(model: DistributedModel) -> dict[str, Any]:
    return {shard.name: (shard.start, shard.parameter.tolist()) for shard in model.shards}


def train_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run several trainings in one job, because starting ranks takes longer than training."""
    return [train(**case) for case in cases]
