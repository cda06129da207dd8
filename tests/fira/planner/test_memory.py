"""Estimates of memory, and the least recomputation that fits."""

from dataclasses import replace

import pytest
import torch

from fira.models.adapters import add_adapters
from fira.models.registry import build, make_config
from fira.nn.lora import Lora
from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate, Constraints
from fira.planner.costs import LayerCost, roofline_costs
from fira.planner.memory import rank_memory, with_least_recompute
from fira.planner.model_profile import profile_of
from fira.planner.search import search
from pipeline.mesh import Layout

BOUNDARY = 128 * 128 * 4  # bytes of one sequence between stages


def saved_costs(microbatch: int) -> list[LayerCost]:
    return [LayerCost(1, 1, 1, 2, saved, 1, workspace, 10**7) for saved, workspace in [(10**6, 0), (10**8, 0), (0, 5)]]


def activations(profile, hardware, schedule, count, recompute=0):
    """Bytes of each rank beyond weights, sums of gradients, moments and the largest gradient."""
    costs = CandidateCosts(
        PlanInputs(profile, hardware, saved_costs, "fp32"), Candidate(Layout(2, 1, 1), schedule, 1, count, recompute)
    )
    largest = [4 * max(costs.layer_kinds[i].largest for i in layers) for layers in costs.rank_layers]
    weights = [4 * sum(costs.parameters(rank)) for rank in range(2)]
    tensors = 3 + {1: 1, 4: 3, 5: 3, 50: 6}[count]  # of a weight; a sum of 50 micro-batches has six partial sums
    return [m - tensors * w - g for m, w, g in zip(rank_memory(costs), weights, largest, strict=True)]


def test_activations_by_schedule(tiny, hardware):
    first, last = 3 * 10**8 + 10**6 + BOUNDARY, 10**8  # embedding and three blocks; a block and the head
    assert activations(tiny, hardware, "gpipe", 5) == [5 * first, 5 * last]
    assert activations(tiny, hardware, "gpipe", 50) == [50 * first, 50 * last]
    assert activations(tiny, hardware, "1f1b", 50) == [2 * first, last]
    assert activations(tiny, hardware, "1f1b", 1) == [first, last]
    # Under ZB-H1 rank 1 delays weight gradients: two micro-batches, with 10 MB for each of two layers' halves.
    assert activations(tiny, hardware, "zb-h1", 4)[1] == 2 * last + 2 * 2 * 10**7


def test_recomputed_block_saves_its_input_only(tiny, hardware):
    first = 2 * 10**8 + 10**6 + 2 * BOUNDARY
    assert activations(tiny, hardware, "1f1b", 50, recompute=1)[0] == 2 * first + 10**8  # one is recomputed at a time


def test_fewest_blocks_are_recomputed_that_make_a_candidate_fit(tiny, hardware):
    cost_model = roofline_costs(tiny, hardware, "fp32")
    inputs = PlanInputs(tiny, hardware, cost_model, "fp32")
    assert not search(inputs, 1, Constraints(64)).best[0].candidate.recompute
    constraints = Constraints(64, microbatch=64)
    plain = search(inputs, 1, constraints).best[0]
    costs = CandidateCosts(inputs, plain.candidate)
    sizes = [max(rank_memory(costs.with_recompute(blocks))) for blocks in range(5)]
    assert sizes[0] > sizes[2] > sizes[3]
    small = PlanInputs(tiny, replace(hardware, memory=(sizes[2] + sizes[3]) / 2), cost_model, "fp32")
    best = search(small, 1, constraints).best[0]
    assert best.candidate == replace(plain.candidate, recompute=3)
    assert max(best.memory) == sizes[3]
    assert best.seconds == pytest.approx(plain.seconds + 3 * cost_model(64)[1].forward)
    tiny_memory = PlanInputs(tiny, replace(hardware, memory=1.0), cost_model, "fp32")
    assert with_least_recompute(CandidateCosts(tiny_memory, plain.candidate)).candidate.recompute == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_copies_for_autocast_are_counted_once_per_rank(tiny, hardware, precision):
    """Two bytes for each weight of attention, experts and head, whatever the number of micro-batches in flight."""
    block, head = tiny.kinds[1].layer, tiny.kinds[2].layer
    attention = sum(p.numel() for name, p in block.attention.named_parameters() if name.endswith("weight"))
    experts = block.moe.experts.w1.numel() + block.moe.experts.w2.numel()
    for ep, count in ((1, 1), (1, 50), (2, 50)):
        candidate = Candidate(Layout(2, ep, ep), "1f1b", 1, count, 0)
        plain, low = (
            rank_memory(CandidateCosts(PlanInputs(tiny, hardware, saved_costs, name), candidate))
            for name in ("fp32", precision)
        )
        by_rank = [3 * (attention + experts / ep), attention + experts / ep + head.project.weight.numel()]
        assert [b - a for a, b in zip(plain, low, strict=True)] == [2 * size for size in by_rank]


def test_replicas_divide_the_moments(tiny, hardware):
    """Two tensors of each parameter less those of the share; experts are divided over the replicas of an expert."""
    table = tiny.config.vocab_size * tiny.config.d_model  # has one owner as a whole
    matrix = max(p.size for p in tiny.kinds[1].trained if p.expert)  # of all experts
    for layout in (Layout(1, 2, 1), Layout(1, 4, 2), Layout(2, 4, 4), Layout(2, 64, 4)):
        inputs = PlanInputs(tiny, hardware, saved_costs, "fp32")
        costs = CandidateCosts(inputs, Candidate(layout, "1f1b", 1, 1, 0))
        plain, sharded = rank_memory(costs), rank_memory(costs.with_sharding("optimizer"))
        for rank, (before, after) in enumerate(zip(plain, sharded, strict=True)):
            replicated, experts = costs.parameters(rank)
            share = max(replicated / layout.dp, table)
            of_experts = max(experts * layout.ep / layout.dp, matrix / layout.ep)
            assert before - after == pytest.approx(4 * 2 * (replicated + experts - share - of_experts), rel=0.02)


@pytest.mark.parametrize("layout", [Layout(), Layout(2, 1, 1), Layout(1, 4, 2)])
def test_muon_has_one_moment_of_hidden_matrices(tiny, muon, hardware, layout):
    candidate = Candidate(layout, "1f1b", 1, 1, 0)
    adamw, less = (CandidateCosts(PlanInputs(p, hardware, saved_costs, "fp32"), candidate) for p in (tiny, muon))
    for rank, memory in enumerate(rank_memory(less)):
        blocks = sum(0 < i < 5 for i in less.rank_layers[rank])
        hidden = blocks * (4 * 128 * 128 + 4 * 2 * 128 * 256 / layout.ep)
        assert rank_memory(adamw)[rank] - memory == 4 * hidden


def test_replicas_hold_the_matrices_that_they_orthogonalise_for_each_other(muon, hardware, monkeypatch):
    """These are larger than the largest gradient, without activations and buckets of the reduction."""
    monkeypatch.setattr("fira.planner.memory.BUCKET", 0)

    def memory(layout: Layout) -> float:
        inputs = PlanInputs(muon, hardware, lambda _: [LayerCost(0, 0, 0, 0, 0, 0)] * 3, "fp32")
        return rank_memory(CandidateCosts(inputs, Candidate(layout, "1f1b", 1, 1, 0)))[0]

    largest = muon.config.vocab_size * 128
    assert memory(Layout(1, 2, 1)) - memory(Layout()) == 4 * (4 * 4 * 2 * 128 * 256 - largest)  # those of experts


@pytest.mark.parametrize(("count", "sums"), [(1, 0), (2, 1), (3, 1), (7, 2), (8, 3)])
@pytest.mark.parametrize("layout", [Layout(1, 4, 1), Layout(2, 4, 2)])
def test_replicas_divide_the_parameters(tiny, hardware, layout, count, sums):
    """A share of weights, moments and earlier sums of gradients; weights and gradients of one layer."""
    inputs = PlanInputs(tiny, hardware, saved_costs, "fp32")
    costs = CandidateCosts(inputs, Candidate(layout, "1f1b", 1, count, 0, "parameters"))
    table, block = tiny.config.vocab_size * tiny.config.d_model, tiny.kinds[1]
    for rank, memory in enumerate(rank_memory(costs)):
        replicated, experts = costs.parameters(rank)
        share = max(replicated / 4, table) + experts * layout.ep / 4
        gathered = 0.75 * (block.parameters + block.expert_parameters / layout.ep)
        layer = max(gathered + block.parameters + block.expert_parameters, 1.75 * table)
        held = [3 * 10**8 + 10**6 + BOUNDARY, 10**8] if layout.pp == 2 else [4 * 10**8 + 10**6]
        in_flight = min(count, layout.pp - rank)
        assert memory - in_flight * held[rank] == pytest.approx(4 * (share * (3 + sums) + layer), rel=0.02)


def test_frozen_weights_have_neither_gradients_nor_moments(hardware):
    """Adapters of experts: one tensor of every frozen weight, four of every adapter with one micro-batch."""
    with torch.device("meta"):
        model = build(make_config("fira-tiny", {"value_embeddings": False}))
        frozen = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
        experts = [sum(p.numel() for p in block.moe.experts.parameters()) for block in model.layers[1:5]]
        add_adapters(model, Lora(2, 4.0, ("experts",)))
    profile = profile_of(model)
    adapters = 2 * sum(sum(w.shape) for w in (torch.empty(256, 128), torch.empty(128, 256)))  # of one expert
    for ep in (1, 2):
        inputs = PlanInputs(profile, hardware, saved_costs, "fp32")
        costs = CandidateCosts(inputs, Candidate(Layout(1, ep, ep), "1f1b", 1, 1, 0))
        trained = 4 * 4 * adapters / ep
        assert costs.parameters(0) == (0, trained)
        weights = sum(frozen) - sum(experts) * (1 - 1 / ep)
        assert costs.frozen_parameters(0) == weights
        largest = 4 * 2 * 256  # elements of the largest adapter
        activations = 10**6 + 4 * 10**8
        gradients = trained * ep  # those of each sending rank
        assert rank_memory(costs)[0] == 4 * (3 * trained + weights + gradients + largest) + activations
    assert costs.reduction(0) == 0.0
