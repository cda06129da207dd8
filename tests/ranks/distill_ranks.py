"""A step of distillation, run on each rank of a test."""

from typing import Any

import torch

from fira.data.derived_batches import DerivedBatches
from fira.data.loader import Loader
from fira.data.text_windows import TextWindows
from fira.models.registry import from_document
from fira.parallel.batch_split import BatchSplit
from fira.parallel.forward_pass import ForwardPass
from fira.parallel.gradients import gradient_of
from fira.parallel.kernel_loading import KernelLoading
from fira.parallel.parallelize import parallelize
from fira.posttraining.distillation import Distillation, TeacherTokens
from fira.posttraining.teacher import Teacher
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, make_mesh
from pipeline.schedule import SCHEDULES
from tests.ranks.dpo_ranks import rows_of
from tests.ranks.parity_ranks import Tokens, meta_model

ORDER, TEMPERATURE = 3, 1.7


def train(
    teacher: dict[str, Any],
    student: dict[str, Any],
    layout: list[int],
    k: int,
    beta: float,
    microbatch: int,
    batch: int,
    schedule: str = "1f1b",
) -> dict[str, Any]:
    """Compute one step in float64 at the learning rate zero.

    teacher, student: the documents of their configs. Returns loss, auxiliary loss, gradient norm and cross-entropy of
    the step; this rank's rows of the weights of both models, and of the gradients, by name: (first row, values).
    """
    torch.set_num_threads(1)
    mesh = make_mesh(Layout(*layout), SCHEDULES[schedule].placement(layout[0]), [CPU])
    models, splits = [], []
    for seed, document in enumerate((teacher, student)):
        config = from_document(document)
        placed = schedule if seed else "1f1b"
        models.append(parallelize(meta_model(config), mesh, 7 + seed, [CPU], placed, torch.float64))
        objective = Distillation(beta, TEMPERATURE) if seed else TeacherTokens(k, TEMPERATURE)
        splits.append(
            BatchSplit(microbatch, mesh.layout.dp, mesh.dp_rank, config.d_model, None, torch.float64, objective)
        )
    forward = ForwardPass(models[0], splits[0], KernelLoading(models[0], mesh))
    windows = TextWindows(Tokens(config.vocab_size), config.seq_len)  # type: ignore[arg-type]
    teacher_model = Teacher(forward, splits[0].objective, config.vocab_size)  # type: ignore[arg-type]
    loader = DerivedBatches(Loader(windows, ORDER), teacher_model.taught)
    trainer = Trainer(models[1], mesh, splits[1], schedule, weight_decay=0.1, clip=0.0, fp16=False)
    result = trainer.step(loader, batch, lr=0.0, seed=11)
    return {
        "step": [result.loss, result.aux_loss, result.grad_norm, *result.metrics.values()],
        "teacher": rows_of(models[0]),
        "student": rows_of(models[1]),
        "gradients": {shard.name: (shard.start, gradient_of(shard).tolist()) for shard in models[1].shards},
    }


def train_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run several trainings in one job, because starting ranks takes longer than training."""
    return [train(**case) for case in cases]
