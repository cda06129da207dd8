"""A step of GRPO, run on each rank of a test."""

from typing import Any

import numpy as np
import torch

from fira.checkpoint.pretrained import open_saved
from fira.data.derived_batches import DerivedBatches
from fira.data.loader import Loader
from fira.data.rows import Rows
from fira.models.registry import from_document
from fira.parallel.batch_split import BatchSplit
from fira.parallel.gradients import gradient_of
from fira.parallel.parallelize import parallelize
from fira.posttraining.answer_sampler import AnswerSampler
from fira.posttraining.grpo import PolicyGradient
from fira.posttraining.prompted_answers import PromptedAnswer, packed
from fira.posttraining.rewarded_answers import RewardedAnswers
from fira.training.state import load_weights
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, make_mesh
from pipeline.schedule import SCHEDULES
from tests.ranks.dpo_ranks import rows_of
from tests.ranks.parity_ranks import meta_model

EOS = 1


class Prompts:
    """Two or three prompts per sequence, with answers of three or four tokens. It has the interface of Windows."""

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        self._seq_len, self._vocab_size = seq_len, vocab_size

    def __len__(self) -> int:
        return 4

    def rows(self, numbers: list[int], count: int) -> Rows:
        return packed([self._documents(number) for number in numbers], self._seq_len)

    def _documents(self, number: int) -> list[PromptedAnswer]:
        draw = np.random.default_rng(number)
        lengths = [(int(draw.integers(2, 5)), int(draw.integers(3, 5))) for _ in range(2 + number % 2)]
        ids = [[draw.integers(2, self._vocab_size, length).tolist() for length in pair] for pair in lengths]
        return [PromptedAnswer(prompt, answer) for prompt, answer in ids]


def reward(answer: list[int], reference: list[int]) -> float:
    """Of a sampled answer: whether its tokens and those of the reference have an even sum."""
    return float((sum(answer) + sum(reference)) % 2 == 0)


def train(
    model: dict[str, Any],
    layout: list[int],
    group: int,
    microbatch: int,
    batch: int,
    schedule: str,
    weights: str | None = None,
    dtype: str = "float64",
) -> dict[str, Any]:
    """Compute one step at the learning rate zero. weights: a folder; by default they are drawn.

    Returns loss, auxiliary loss, gradient norm and metrics of the step; the sequences, as tokens, targets and
    documents; this rank's rows of the weights and of the gradients, by name: (first row, values).
    """
    torch.set_num_threads(1)
    config = from_document(model)
    mesh = make_mesh(Layout(*layout), SCHEDULES[schedule].placement(layout[0]), [CPU])
    kind = getattr(torch, dtype)
    built = parallelize(meta_model(config), mesh, 7, [CPU], schedule, kind)
    if weights:
        load_weights(open_saved(weights), built)
    split = BatchSplit(microbatch, mesh.layout.dp, mesh.dp_rank, config.d_model, None, kind, PolicyGradient())
    answers = RewardedAnswers(AnswerSampler(built, mesh, EOS, 0, seed=5), reward, group)
    loader = DerivedBatches(Loader(Prompts(config.seq_len, config.vocab_size), 3), answers, group)
    trainer = Trainer(built, mesh, split, schedule, weight_decay=0.1, clip=0.0, fp16=False)
    result = trainer.step(loader, batch, lr=0.0, seed=11)
    rows = loader.batch(0, batch)
    return {
        "step": [result.loss, result.aux_loss, result.grad_norm, *result.metrics.values()],
        "rows": [array.tolist() for array in (rows.tokens, rows.targets, rows.documents) if array is not None],
        "weights": rows_of(built),
        "gradients": {shard.name: (shard.start, gradient_of(shard).tolist()) for shard in built.shards},
    }


def train_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run several trainings in one job, because starting ranks takes longer than training."""
    return [train(**case) for case in cases]
