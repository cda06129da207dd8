"""Predicted and measured step time of several layouts. Started by run.py under mpirun."""

import json
import statistics
import sys
import time

import torch
import torch.distributed as dist

import pipeline
from benchmarks.measure import maximum
from fira.data.random_tokens import RandomTokens
from fira.doctor.one_step import make_trainer
from fira.models.registry import build, make_config
from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate
from fira.planner.measure import measure
from fira.planner.model_profile import profile_of
from fira.planner.step_time import predict
from pipeline.mesh import CPU, Layout

MODELS = {
    "fira-tiny": {},
    "fira 15M": {"d_model": 256, "num_layers": 6, "d_ff": 1024, "n_head": 4, "num_experts": 4},
}
BATCH, STEPS = 16, 9
CANDIDATES = {
    1: [Candidate(Layout(1, 1, 1), "1f1b", 4, 4, 0)],
    2: [
        Candidate(Layout(2, 1, 1), "1f1b", 4, 4, 0),
        Candidate(Layout(2, 1, 1), "zb-h1", 4, 4, 0),
        Candidate(Layout(2, 1, 1), "zb-v", 4, 4, 0),
        Candidate(Layout(1, 2, 1), "1f1b", 4, 2, 0),
        Candidate(Layout(1, 2, 2), "1f1b", 4, 2, 0),
    ],
    4: [Candidate(Layout(2, 2, 2), "1f1b", 4, 2, 0)],
}


def step_seconds(config, candidate: Candidate) -> float:
    """Return the median step time on the slowest rank."""
    trainer = make_trainer(config, candidate.layout, candidate.schedule, CPU, candidate.microbatch)
    loader = RandomTokens(config.vocab_size, config.seq_len)
    times = []
    for _ in range(STEPS):
        dist.barrier()
        started = time.perf_counter()
        trainer.step(loader, BATCH, 1e-4, 0, [])
        times.append(time.perf_counter() - started)
    return maximum(statistics.median(times[2:]))


def main() -> None:
    world = pipeline.init()
    for name, changes in MODELS.items():
        config = make_config("fira-tiny", changes)
        with torch.device("meta"):
            profile = profile_of(build(config))
        hardware, cost_model = measure(profile, [4], "fp32", torch.device("cpu"), world.size, world)
        inputs = PlanInputs(profile, hardware, cost_model, "fp32")
        for candidate in CANDIDATES[world.size]:
            estimate = predict(CandidateCosts(inputs, candidate))
            seconds = step_seconds(config, candidate)
            if world.rank == 0:
                row = {
                    "model": name,
                    "layout": str(candidate.layout),
                    "schedule": candidate.schedule,
                    "predicted_ms": estimate.seconds * 1e3,
                    "measured_ms": seconds * 1e3,
                    "breakdown_ms": {cause: round(value * 1e3, 2) for cause, value in estimate.breakdown.items()},
                }
                print(json.dumps(row), flush=True)
    if world.rank == 0:
        print(json.dumps({"links": str(hardware.inside)}), file=sys.stderr)


if __name__ == "__main__":
    main()
