"""The contenders on one number of ranks: peak memory and step time. Started by run.py under mpirun."""

import json
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import pipeline
from benchmarks.measure import alternate, maximum, peak_allocated
from benchmarks.training.ranks import BATCH, CONFIG, Run, data_parallel, step_of
from fira.data.random_tokens import RandomTokens
from fira.doctor.one_step import make_trainer
from fira.models.fira import FIRA
from fira.planner.best_candidates import memory_only
from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate
from fira.planner.costs import roofline_costs
from fira.planner.memory import rank_memory
from fira.planner.model_profile import profile_of
from pipeline.mesh import CPU, Layout

SHARDED = [(None, 1), ("optimizer", 1), ("parameters", 1), (None, 2), ("parameters", 2)]  # with micro-batches


def ours(candidate: Candidate) -> Run:
    """Return a step of this project."""
    c = candidate
    trainer = make_trainer(CONFIG, c.layout, c.schedule, CPU, c.microbatch, shard=c.shard)
    loader = RandomTokens(CONFIG.vocab_size, CONFIG.seq_len)
    return lambda: trainer.step(loader, BATCH, 1e-4, 0, [])


def fully_sharded(group: dist.ProcessGroup) -> Run:
    """Return a step of the same model in PyTorch's FSDP2, with each layer as a unit."""
    mesh = DeviceMesh.from_group(group, "cpu")
    with torch.device("meta"):
        model = FIRA(CONFIG)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return step_of(model)


def predicted(candidate: Candidate) -> float:
    """Return the planner's estimate of a rank's bytes."""
    with torch.device("meta"):
        profile = profile_of(FIRA(CONFIG))
    hardware = memory_only(1e12, "fp32", 1, "cpu")
    inputs = PlanInputs(profile, hardware, roofline_costs(profile, hardware, "fp32", "cpu"), "fp32")
    return max(rank_memory(CandidateCosts(inputs, candidate)))


def main(rounds: str, *names: str) -> None:
    world = pipeline.init(timeout_s=3600)
    share, gloo = BATCH // world.size, dist.new_group(backend="gloo")
    layout = Layout(1, world.size, 1)
    candidates = {
        f"ours{f', --shard {shard}' if shard else ''}{f', {count} micro-batches' if count > 1 else ''}": Candidate(
            layout, "1f1b", share // count, count, 0, shard
        )
        for shard, count in SHARDED
    }
    makers: dict[str, Any] = {name: lambda c=candidate: ours(c) for name, candidate in candidates.items()}
    makers |= {"DDP": lambda: data_parallel(gloo), "FSDP2": lambda: fully_sharded(gloo)}
    makers = {name: make for name, make in makers.items() if name in names or not names}
    seconds = {}
    if int(rounds):
        seconds = alternate({name: make() for name, make in makers.items()}, int(rounds))
    for name, make in makers.items():
        peak = maximum(peak_allocated(lambda make=make: two_steps(make)))
        row = {
            "ranks": world.size,
            "contender": name,
            "peak_mb": peak / 1e6,
            "predicted_mb": predicted(candidates[name]) / 1e6 if name in candidates else None,
            "seconds": maximum(median(seconds[name])) if seconds else None,
        }
        if world.rank == 0:
            print("row:", json.dumps(row), flush=True)


def two_steps(make: Callable[[], Run]) -> None:
    run = make()
    run()
    run()


if __name__ == "__main__":
    main(*sys.argv[1:])
