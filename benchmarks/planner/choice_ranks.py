"""The chosen layout and the measured steps of many others. Started by choices.py under mpirun.

One step of every candidate whose predicted time is at most LIMIT times the shortest is timed after a warm-up. The
fastest ones and the chosen one are then timed in ROUNDS alternated rounds.
"""

import json
import statistics
import sys
import time

import torch

import pipeline
from fira.data.random_tokens import RandomTokens
from fira.models.registry import build, make_config
from fira.planner.best_candidates import plan_here
from fira.planner.candidates import Candidate
from fira.planner.model_profile import profile_of
from fira.training.auto_layout import constraints_of, describe, plan_layout
from fira.training.config import TrainConfig
from fira.training.trial_steps import step_seconds, trial_seconds, trial_trainer
from pipeline.mesh import CPU

LIMIT, MEASURED, FINALISTS, ROUNDS, TURN = 2.0, 12, 4, 4, 4


def main(preset: str, changes: str, batch: int, seq_len: int) -> None:
    world = pipeline.init()
    config = TrainConfig(model=preset, model_set=changes, seq_len=seq_len, batch_size=batch, precision="fp32")
    with torch.device("meta"):
        model = build(make_config(preset, config.model_changes()))
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        plan = plan_layout(config, model, batch, [CPU], world)
        seconds.append(time.perf_counter() - started)
    chosen = plan.trials[0]

    found, _ = plan_here(profile_of(model), constraints_of(config, batch), "fp32", world.size, CPU, world, 10_000)
    near = [estimate for estimate in found.best if estimate.seconds <= LIMIT * found.best[0].seconds]
    step = -(-len(near) // MEASURED)  # all layouts and schedules are among them
    considered = {estimate.candidate for estimate in near[::step]} | {trial.candidate for trial in plan.trials}
    ordered = sorted(considered, key=str)  # the same order on all ranks
    first = {candidate: trial_seconds(model, candidate, batch, config, [CPU]) for candidate in ordered}
    finalists = sorted(first, key=first.__getitem__)[:FINALISTS]
    times = alternated(model, list(dict.fromkeys([chosen.candidate, *finalists])), batch, config)
    best = min(times, key=times.__getitem__)
    if world.rank == 0:
        row = {
            "million_parameters": sum(p.numel() for p in model.parameters()) / 1e6,
            "chosen": str(chosen),
            "best": describe(best),
            "chosen_ms": times[chosen.candidate] * 1e3,
            "best_ms": times[best] * 1e3,
            "promised_ms": chosen.seconds * 1e3,
            "candidates": plan.considered,
            "measured_candidates": len(considered),
            "cold_s": seconds[0],
            "cached_s": seconds[1],
        }
        print(json.dumps(row))


def alternated(model, candidates: list[Candidate], batch: int, config: TrainConfig) -> dict[Candidate, float]:
    """The median seconds of a step of each candidate, in rounds in which each does TURN steps.

    The first step of a turn is not timed: it finds another candidate's tensors in the caches.
    """
    tokens = RandomTokens(model.config.vocab_size, model.config.seq_len)
    trainers = {candidate: trial_trainer(model, candidate, config, [CPU]) for candidate in candidates}
    times = {candidate: [] for candidate in candidates}
    for _ in range(ROUNDS):
        for candidate, trainer in trainers.items():
            times[candidate] += [step_seconds(trainer, tokens, batch) for _ in range(TURN)][1:]
    return {candidate: statistics.median(values) for candidate, values in times.items()}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
