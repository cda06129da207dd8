"""Loss scaling of fp16 on several ranks: an overflow on one of them, and gradients that are unscaled everywhere."""

import functools
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fira.data.loader import Loader
from fira.data.text_windows import TextWindows
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.parallelize import parallelize
from fira.training.trainer import Trainer
from pipeline.mesh import Layout, make_mesh
from tests.launch import run_function
from tests.ranks import trainer_ranks
from tests.ranks.trainer_ranks import BATCH, CPU, SEQ_LEN, Tokens, meta_model, weights

CONFIG = replace(trainer_ranks.CONFIG, num_experts=4)
PIPELINE, EXPERTS = [2, 1, 1], [1, 2, 2]  # pp, dp, ep


def make(layout: list[int], fp16: bool) -> tuple[Trainer, Loader]:
    """A trainer in float64, in which a scale that is a power of two changes no digit."""
    mesh = make_mesh(Layout(*layout), range(layout[0]))
    model = parallelize(meta_model(CONFIG), mesh, 7, [CPU], dtype=torch.float64)
    split = BatchSplit(2, mesh.layout.dp, mesh.dp_rank, CONFIG.d_model)
    trainer = Trainer(model, mesh, split, "1f1b", OptimizerSettings(), clip=0.5, fp16=fp16)
    return trainer, Loader(TextWindows(Tokens(CONFIG.vocab_size, 301), SEQ_LEN), seed=3)  # type: ignore[arg-type]


def scaled_and_not(layout: list[int]) -> list[Any]:
    """Results and weights after a step with and without a loss scale."""
    found = []
    for fp16 in (False, True):
        trainer, loader = make(layout, fp16)
        result = asdict(trainer.step(loader, BATCH, 1e-2, seed=11)) | {"bubble": 0}
        found.append([result, {name: value.tolist() for name, value in weights(trainer).items()}])
    assert trainer.scale.value > 1
    return found


def check(layout: list[int]) -> list[Any]:
    return [scaled_and_not(layout), overflow_on_one_rank(layout)]


@functools.cache
def results(*layout: int) -> list[Any]:
    return run_function(2, __name__, "check", layout=layout)


def overflow_on_one_rank(layout: list[int]) -> list[Any]:
    """A step in which a gradient of rank 1 alone overflows: skipped, changed, and the factor of the scale."""
    trainer, loader = make(layout, fp16=True)
    before, scale = weights(trainer), trainer.scale.value
    if dist.get_rank() == 1:
        experts = [s for s in trainer.model.shards if ".experts." in s.name]
        experts[-1].leaf.register_hook(lambda g: g * float("inf"))
    result = trainer.step(loader, BATCH, 1e-2, seed=11)
    changed = any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    return [result.skipped, changed, trainer.scale.value / scale]


@pytest.mark.parametrize("layout", [PIPELINE, EXPERTS])
def test_scaled_step_is_bitwise_identical_to_an_unscaled_one(layout):
    for (plain, scaled), _ in results(*layout):
        assert scaled == plain


@pytest.mark.parametrize("layout", [PIPELINE, EXPERTS])
def test_overflow_on_one_rank_skips_the_step_on_all(layout):
    assert [overflow for _, overflow in results(*layout)] == [[True, False, 0.5]] * 2
