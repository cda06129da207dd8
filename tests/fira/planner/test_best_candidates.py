"""Plans for described devices, their report, and errors."""

from dataclasses import replace

import pytest
import torch

from fira.errors import UserError
from fira.models.registry import build, make_config
from fira.planner.best_candidates import least_recompute, plan_for
from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate
from fira.planner.costs import roofline_costs
from fira.planner.device_specs import load
from fira.planner.memory import rank_memory
from fira.planner.model_profile import ModelProfile, profile_of
from fira.planner.plan_report import command_line, describe_plan
from fira.training.auto_layout import constraints_of
from fira.training.config import TrainConfig
from pipeline.mesh import Layout


def meta_profile(preset: str) -> ModelProfile:
    with torch.device("meta"):
        return profile_of(build(make_config(preset, {})))


def test_plan_for_16384_ranks():
    config = TrainConfig(model="rish-base", precision="bf16", batch_size=16384)
    constraints = constraints_of(config, 16384)
    hardware = load("h200")
    result = plan_for(meta_profile(config.model), constraints, config.precision, 16384, hardware)
    times = [estimate.seconds for estimate in result.best]
    assert times == pytest.approx(sorted(times), rel=1e-5)
    assert len(result.best) == 10
    for estimate in result.best:
        assert estimate.candidate.layout.world == 16384
        assert max(estimate.memory) <= hardware.memory
        assert sum(estimate.breakdown.values()) == pytest.approx(estimate.seconds)
    text = describe_plan(result, hardware, "bf16", 16384 * 4096, ["--model", "rish-base"])
    assert text.splitlines()[-1] == command_line(result.best[0].candidate, ["--model", "rish-base"])
    assert f"the best of {result.candidates} candidates on NVIDIA H200 in bf16, 141.0 GB per rank" in text


def test_command_line():
    candidate = Candidate(Layout(2, 2, 1), "zb-h1", 4, 2, 3)
    assert command_line(candidate, ["--model", "fira-tiny"]) == (
        "mpirun -np 4 python scripts/train.py --model fira-tiny --pp 2 --dp 2 --ep 1 --schedule zb-h1 "
        "--micro-batch-size 4 --recompute 3"
    )


def test_least_recompute(hardware, monkeypatch):
    profile, candidate = meta_profile("fira-tiny"), Candidate(Layout(), "1f1b", 64, 1, 0)
    hardware = replace(hardware, overlaps_collectives=True)  # as on GPUs
    inputs = PlanInputs(profile, hardware, roofline_costs(profile, hardware, "fp32"), "fp32")
    costs = CandidateCosts(inputs, candidate)
    sizes = [max(rank_memory(costs.with_recompute(blocks))) for blocks in range(5)]
    memory = {"bytes": (sizes[2] + sizes[3]) / 2}
    monkeypatch.setattr("fira.planner.best_candidates.device_memory", lambda device, ranks: memory["bytes"])
    arguments = profile, candidate, "fp32", torch.device("cuda"), 1
    assert least_recompute(*arguments) == 3
    memory["bytes"] = sizes[0]
    assert least_recompute(*arguments) == 0
    memory["bytes"] = sizes[4] / 2
    with pytest.raises(UserError, match="with all blocks recomputed a rank needs"):
        least_recompute(*arguments)


@pytest.mark.parametrize(
    ("change", "ranks", "device", "message"),
    [
        ({}, 2, "h2000", "--device h2000: no such device; choose this, a100, h100, h200, t4, or give a TOML file"),
        ({}, 2, "nowhere.toml", "no such device"),
        ({"precision": "fp8"}, 2, "t4", "--precision fp8: NVIDIA T4 has no FLOP/s for it; choose one of fp64, fp32"),
        ({"model": "rish-base"}, 1, "t4", "does not fit: the smallest of .* needs .* NVIDIA T4 has 16.0"),
        ({"pp": 3}, 4, "t4", "no layout of 4 ranks"),
        ({"batch_size": 2, "pp": 1}, 4, "t4", "no layout of 4 ranks .* 2 sequences"),
    ],
)
def test_invalid_constraints_raise_one_line_error(change, ranks, device, message):
    config = TrainConfig(**{"model": "fira-tiny", "precision": "fp32", **change})
    constraints = constraints_of(config, config.recipe().batch_size)
    with pytest.raises(UserError, match=message) as error:
        plan_for(meta_profile(config.model), constraints, config.precision, ranks, load(device))
    assert "\n" not in str(error.value)
