"""Seconds of a training step with a candidate layout, measured by running steps on random tokens."""

import copy
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

STEPS = 3  # timed, after one that is not


def trial_seconds(
    model: LanguageModel, candidate: Candidate, batch: int, config: TrainConfig, devices: list[torch.device]
) -> float:
    """The seconds of a step on the slowest rank, the least of `STEPS` steps (collective).

    model: on the meta device. batch: sequences. config: for the precision and the optimizer.
    """
    layout, schedule, precision = candidate.layout, candidate.schedule, config.precision
    mesh = make_mesh(layout, SCHEDULES[schedule].placement(layout.pp), devices)
    dtype, autocast = parameter_dtype(precision), AUTOCAST_DTYPES.get(precision)
    split = BatchSplit(candidate.microbatch, layout.dp, mesh.dp_rank, model.config.d_model, devices[0], dtype)
    whole = copy.deepcopy(model)
    built = parallelize(whole, mesh, config.seed, devices, schedule, dtype, autocast, candidate.recompute)
    optimizer, fp16 = config.optimizer_settings(), precision == "fp16"
    trainer = Trainer(built, mesh, split, schedule, optimizer, config.clip, fp16, candidate.sharded)
    tokens, seconds = RandomTokens(model.config.vocab_size, model.config.seq_len), []
    for _ in range(1 + STEPS):
        started = time.perf_counter()
        trainer.step(tokens, batch, lr=0.0, seed=0)
        seconds.append(time.perf_counter() - started)
    for group in {*mesh.groups.values(), *mesh.ep_groups, *mesh.channels.values()}:
        dist.destroy_process_group(group)
    slowest = torch.tensor(seconds[1:], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest.min())
