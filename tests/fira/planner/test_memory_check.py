"""Runs that do not fit into memory are refused before they start, and runs that fit are not."""

import re
from dataclasses import replace

import pytest
import torch

from fira.errors import UserError
from fira.models.registry import PRESETS, build, make_config
from fira.parallel.parallelize import EVERY_BLOCK
from fira.planner import memory_check
from fira.planner.candidates import Candidate
from fira.planner.memory_check import LEAST, MOST, SharedMemory, check_memory
from fira.planner.model_profile import profile_of
from pipeline.mesh import Layout

slow = pytest.mark.slow
CPU = [torch.device("cpu")]


def meta_model(preset: str, **changes):
    with torch.device("meta"):
        return build(make_config(preset, changes))


def estimates(model, candidate: Candidate, precision: str = "fp32") -> list[float]:
    """Lower bound, the planner's estimate and upper bound of the largest rank."""
    profile = profile_of(model)
    least, most = (memory_check._bounded_needs(profile, precision, "cpu", bound) for bound in (LEAST, MOST))
    return [max(needs(candidate)) for needs in (least, memory_check._estimated_needs(profile, precision), most)]


@pytest.mark.parametrize(
    "preset", [name if name == "rish-tiny" else pytest.param(name, marks=slow) for name in PRESETS]
)
def test_bounds_enclose_the_estimate_of_the_planner(preset):
    model = meta_model(preset)
    for candidate in (
        Candidate(Layout(), "1f1b", 8, 4, 0),
        Candidate(Layout(), "1f1b", 8, 4, EVERY_BLOCK),
        Candidate(Layout(2, 2, 1), "zb-h1", 2, 4, 1),
    ):
        least, estimate, most = estimates(model, candidate)
        assert least <= estimate <= most


@slow
@pytest.mark.parametrize(
    ("preset", "changes", "precision"),
    [
        ("fira-tiny", {"d_ff": 4096, "top_k": 4, "num_layers": 1}, "fp32"),
        ("fira-tiny", {"capacity_factor": 0.1, "num_experts": 64, "top_k": 8, "d_ff": 64}, "fp32"),
        ("rish-tiny", {"num_experts": 128, "top_k": 8, "d_ff": 64}, "bf16"),
        ("microrwkv-tiny", {"seq_len": 512, "window": 16}, "fp64"),
        ("blues-base", {"seq_len": 2048}, "fp16"),
    ],
)
def test_bounds_of_unusual_models(preset, changes, precision):
    least, estimate, most = estimates(meta_model(preset, **changes), Candidate(Layout(), "1f1b", 4, 1, 0), precision)
    assert least <= estimate <= most


def check(monkeypatch, gigabytes: float, model, candidate: Candidate, ranks: int = 1) -> str:
    """The message of the check on one machine with this memory; empty if the candidate fits."""
    memories = [SharedMemory(gigabytes * 1e9, list(range(ranks)))]
    monkeypatch.setattr(memory_check, "_memories", lambda candidate, devices: memories)
    try:
        check_memory("model", profile_of(model), candidate, "fp32", CPU)
    except UserError as error:
        return str(error)
    return ""


def test_suggested_micro_batch_is_the_largest_power_of_two_that_surely_fits(monkeypatch):
    model, candidate = meta_model("fira-tiny", value_embeddings=False), Candidate(Layout(), "1f1b", 1024, 1, 0)
    message = check(monkeypatch, 4.0, model, candidate)
    assert message.startswith("model needs about ")
    assert message.endswith(" 4.0 GB available; try --micro-batch-size 512")
    assert check(monkeypatch, 4.0, model, replace(candidate, microbatch=512, count=2)) == ""


def test_recomputation_is_suggested_if_one_sequence_does_not_fit(monkeypatch):
    model = meta_model("fira-tiny", seq_len=2048, value_embeddings=False)
    candidate = Candidate(Layout(), "1f1b", 1, 2, 0)
    least, estimate, _ = estimates(model, candidate)
    _, recomputed, _ = estimates(model, replace(candidate, recompute=EVERY_BLOCK))
    available = 1.02 * max(least, recomputed)  # the estimate decides
    assert available < 0.9 * estimate
    message = check(monkeypatch, available / 1e9, model, candidate)
    assert message.endswith("try --micro-batch-size 1 --recompute full")


@pytest.mark.parametrize(("shard", "less"), [("optimizer", None), ("parameters", "optimizer")])
def test_sharding_is_suggested_where_it_is_enough(monkeypatch, shard, less):
    model, candidate = meta_model("rish-tiny", seq_len=16), Candidate(Layout(1, 2, 1), "1f1b", 1, 1, 0, less)
    needs = memory_check._estimated_needs(profile_of(model), "fp32")
    (more,), (sharded,) = needs(candidate), needs(replace(candidate, shard=shard))
    assert sharded < 0.9 * more
    message = check(monkeypatch, 1.1 * sharded / 1e9, model, candidate)
    assert message.endswith(f"try --shard {shard}")


@pytest.mark.parametrize(
    ("gigabytes", "preset", "microbatch", "count", "message"),
    [
        (4.0, "fira-tiny", 2**20, 1, r"needs about .* GB per rank, 4\.0 GB available; try --micro-batch-size \d+$"),
        (0.5, "fira-tiny", 1, 2**20, r"try --batch-size \d+ --micro-batch-size 1 --recompute full$"),
        (
            100.0,
            "rish-base",
            1,
            16,
            r"needs about [\d,.]+ GB per rank, 100\.0 GB available; try at least \d+ times as many",
        ),
    ],
)
def test_remedies(monkeypatch, gigabytes, preset, microbatch, count, message):
    found = check(monkeypatch, gigabytes, meta_model(preset), Candidate(Layout(), "1f1b", microbatch, count, 0))
    assert re.search(message, found)
    assert "\n" not in found


def test_ranks_of_a_machine_share_its_memory(monkeypatch):
    model, candidate = meta_model("fira-tiny"), Candidate(Layout(2, 1, 1), "1f1b", 16, 4, 0)
    needs = memory_check._estimated_needs(profile_of(model), "fp32")(candidate)
    assert check(monkeypatch, 1.01 * sum(needs) / 1e9, model, candidate, ranks=2) == ""
    assert "try" in check(monkeypatch, 0.9 * sum(needs) / 1e9, model, candidate, ranks=2)
    memories = [SharedMemory(1.01 * need, [rank]) for rank, need in enumerate(needs)]  # two machines
    monkeypatch.setattr(memory_check, "_memories", lambda candidate, devices: memories)
    check_memory("model", profile_of(model), candidate, "fp32", CPU)
