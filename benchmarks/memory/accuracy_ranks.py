"""Predicted and measured peak memory of the cases for one number of ranks. Started by accuracy.py under mpirun."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch

import pipeline
from benchmarks.measure import maximum, peak_allocated
from fira.data.random_tokens import RandomTokens
from fira.devices import AUTOCAST_DTYPES, keep_freed_memory
from fira.doctor.one_step import make_trainer
from fira.models.registry import build, make_config
from fira.planner.best_candidates import memory_only
from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate
from fira.planner.costs import roofline_costs
from fira.planner.memory import rank_memory
from fira.planner.model_profile import profile_of
from pipeline.mesh import CPU, Layout

# of fira-tiny, to 9 million parameters
LARGER = {"d_model": 192, "num_layers": 5, "d_ff": 768, "n_head": 4, "num_experts": 4, "seq_len": 64}


@dataclass(frozen=True)
class Case:
    """A model and a candidate, trained by --optimizer and --precision."""

    preset: str
    candidate: Candidate
    changes: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    precision: str = "fp32"

    def __str__(self) -> str:
        """The flags of the case."""
        c = self.candidate
        model = "fira 9M" if self.changes == LARGER else self.preset
        recompute = f", {c.recompute} recomputed" if c.recompute else ""
        shard = f", --shard {c.shard}" if c.shard else ""
        precision = "" if self.precision == "fp32" else f", {self.precision}"
        return f"{model}, {c.schedule}, {c.count} × {c.microbatch}{recompute}{shard}, {self.optimizer}{precision}"


CASES = [
    Case("fira-tiny", Candidate(Layout(), "1f1b", 4, 4, 0)),
    Case("fira-tiny", Candidate(Layout(), "1f1b", 8, 1, 2), LARGER, "muon"),
    Case("blues-tiny", Candidate(Layout(), "1f1b", 8, 2, 0), {}, "muon"),
    Case("microrwkv-tiny", Candidate(Layout(), "1f1b", 8, 1, 0)),
    Case("fira-tiny", Candidate(Layout(1, 2, 1), "1f1b", 4, 1, 0), LARGER),
    Case("fira-tiny", Candidate(Layout(1, 2, 1), "1f1b", 4, 3, 0, "optimizer"), LARGER, "muon"),
    Case("fira-tiny", Candidate(Layout(1, 2, 1), "1f1b", 4, 2, 0, "parameters"), LARGER),
    Case("fira-tiny", Candidate(Layout(1, 2, 2), "1f1b", 4, 2, 0), LARGER, "muon"),
    Case("fira-tiny", Candidate(Layout(2, 1, 1), "zb-h1", 4, 4, 0), LARGER),
    Case("fira-tiny", Candidate(Layout(2, 1, 1), "zb-v", 4, 4, 0), LARGER, "muon"),
    Case("mooshak-tiny", Candidate(Layout(2, 1, 1), "gpipe", 4, 4, 0)),
    Case("rish-tiny", Candidate(Layout(1, 2, 1), "1f1b", 8, 1, 0), {}, "muon"),
    Case("blues-tiny", Candidate(Layout(2, 1, 1), "interleaved", 4, 4, 1)),
    Case("fira-tiny", Candidate(Layout(2, 2, 2), "1f1b", 4, 2, 0), LARGER),
    Case("fira-tiny", Candidate(Layout(2, 2, 1), "dualpipev", 2, 4, 0), LARGER, "muon"),
    Case("rish-tiny", Candidate(Layout(4, 1, 1), "1f1b", 2, 8, 0)),
    Case("fira-tiny", Candidate(Layout(1, 4, 2), "1f1b", 4, 1, 0, "parameters"), LARGER, "muon"),
    Case("mooshak-tiny", Candidate(Layout(1, 4, 1), "1f1b", 4, 1, 0, "optimizer")),
]


def predicted(case: Case) -> float:
    """Return the planner's estimate of the bytes of the rank with the most."""
    with torch.device("meta"):
        profile = profile_of(build(make_config(case.preset, case.changes)), case.optimizer)
    hardware = memory_only(1e12, case.precision, 1, "cpu")
    cost_model = roofline_costs(profile, hardware, case.precision, "cpu")
    return max(rank_memory(CandidateCosts(PlanInputs(profile, hardware, cost_model, case.precision), case.candidate)))


def measured(case: Case) -> float:
    """Return the largest number of bytes that torch allocates on a rank in two steps (collective)."""
    c, config = case.candidate, make_config(case.preset, case.changes)
    batch = c.count * c.microbatch * c.layout.dp

    def run() -> None:
        autocast = AUTOCAST_DTYPES.get(case.precision)
        trainer = make_trainer(
            config, c.layout, c.schedule, CPU, c.microbatch, autocast, c.shard, c.recompute, case.optimizer
        )
        loader = RandomTokens(config.vocab_size, config.seq_len)
        for _ in range(2):
            trainer.step(loader, batch, 1e-4, 0, [])

    return maximum(peak_allocated(run))


def main() -> None:
    world = pipeline.init(timeout_s=3600)
    keep_freed_memory()
    for case in CASES:
        if case.candidate.layout.world != world.size:
            continue
        peak = measured(case)
        if world.rank == 0:
            row = {
                "layout": str(case.candidate.layout),
                "case": str(case),
                "predicted_mb": predicted(case) / 1e6,
                "measured_mb": peak / 1e6,
            }
            print("row:", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
