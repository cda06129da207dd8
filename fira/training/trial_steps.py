"""Seconds of a training step with a candidate layout, measured by running steps on random tokens."""

import math
import time

import torch
import torch.distributed as dist

from fira.data.random_tokens import RandomTokens
from fira.devices import AUTOCAST_DTYPES, parameter_dtype
from fira.models.language_model import LanguageModel
from fira.parallel.batch_split import BatchSplit
from fira.parallel.parallelize import parallelize
from fira.planner.candidates import Candidate
from fira.training.config import TrainConfig
from fira.training.trainer import Trainer
from pipeline.mesh import make_mesh
from pipeline.schedule import SCHEDULES

STEPS = 3  # timed
HOPELESS = 1.15  # times the fastest candidate: after one such step, no other is timed


def trial_seconds(
    model: LanguageModel,
    candidate: Candidate,
    batch: int,
    config: TrainConfig,
    devices: list[torch.device],
    steps: int = STEPS,
    best: float = math.inf,
) -> float:
    """The seconds of a step, the least of `steps` steps after one that is not timed (collective).

    batch: sequences. best: that of the fastest candidate so far; a slower one gets fewer steps. The other arguments are
    those of `trial_trainer`.
    """
    trainer = trial_trainer(model, candidate, config, devices)
    tokens = RandomTokens(model.config.vocab_size, model.config.seq_len)
    step_seconds(trainer, tokens, batch)
    fastest = math.inf
    for _ in range(steps):
        fastest = min(fastest, step_seconds(trainer, tokens, batch))
        if fastest > HOPELESS * best:
            break
    mesh = trainer.mesh
    for group in {*mesh.groups.values(), *mesh.ep_groups, *mesh.channels.values()}:
        dist.destroy_process_group(group)
    return fastest


def trial_trainer(
    model: LanguageModel, candidate: Candidate, config: TrainConfig, devices: list[torch.device]
) -> Trainer:
    """A trainer with the layout of a candidate and new weights (collective).

    model: on the meta device. config: for the precision and the optimizer.
    """
    layout, schedule, precision = candidate.layout, candidate.schedule, config.precision
    mesh = make_mesh(layout, SCHEDULES[schedule].placement(layout.pp), devices)
    dtype, autocast = parameter_dtype(precision), AUTOCAST_DTYPES.get(precision)
    split = BatchSplit(candidate.microbatch, layout.dp, mesh.dp_rank, model.config.d_model, devices[0], dtype)
    recompute, shard = candidate.recompute, candidate.shard
    built = parallelize(model, mesh, config.seed, devices, schedule, dtype, autocast, recompute, shard)
    optimizer, fp16 = config.optimizer_settings(), precision == "fp16"
    return Trainer(built, mesh, split, schedule, optimizer, config.clip, fp16)


def step_seconds(trainer: Trainer, tokens: RandomTokens, batch: int) -> float:
    """The seconds of one step of `batch` sequences on the slowest rank; all ranks begin together (collective)."""
    dist.barrier()
    started = time.perf_counter()
    trainer.step(tokens, batch, lr=0.0, seed=0)
    return slowest_rank(time.perf_counter() - started)


def slowest_rank(seconds: float) -> float:
    """The maximum over all ranks (collective)."""
    result = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return float(result)
