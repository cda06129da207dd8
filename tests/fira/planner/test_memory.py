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
from fira.planner.step_memory import passes_peak
from fira.planner.tensor_memory import LayerMemory
from fira.planner.update_memory import update_peak
from pipeline.mesh import Layout
from tests.launch import run_function

SAVED = 10**11  # bytes that a block saves, of which weights and gradients are a thousandth


def saved_costs(microbatch: int) -> list[LayerCost]:
    """Costs of embedding, block and head."""
    memories = [LayerMemory(), LayerMemory(SAVED, SAVED // 10), LayerMemory()]
    return [LayerCost(1, 1, 1, 2, 1, memory=memory) for memory in memories]


def blocks_held(profile, hardware, schedule, count, recompute=0):
    """[rank] the largest number of blocks whose activations are in memory."""
    candidate = Candidate(Layout(2, 1, 1), schedule, 1, count, recompute)
    return [
        m / SAVED for m in rank_memory(CandidateCosts(PlanInputs(profile, hardware, saved_costs, "fp32"), candidate))
    ]


@pytest.mark.parametrize(
    ("schedule", "count", "recompute", "expected"),
    [  # the first rank has the embedding and three blocks, the second one a block and the head
        ("gpipe", 5, 0, [15, 5]),
        ("gpipe", 50, 0, [150, 50]),
        ("1f1b", 50, 0, [6, 1]),
        ("1f1b", 1, 0, [3, 1]),
        ("zb-h1", 4, 0, [6, 2.2]),  # the second rank delays weight gradients: two micro-batches, each with 0.1
        ("1f1b", 50, 1, [4, 1]),  # the first block is recomputed when the others have freed what they saved
        ("1f1b", 50, 3, [1, 1]),
    ],
)
def test_activations_by_schedule(tiny, hardware, schedule, count, recompute, expected):
    assert blocks_held(tiny, hardware, schedule, count, recompute) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("count", "gradients"), [(1, 1), (2, 2), (3, 2), (4, 3), (8, 4), (9, 4)])
@pytest.mark.parametrize("layout", [Layout(), Layout(1, 2, 2), Layout(1, 4, 1)])
def test_sums_of_gradients(tiny, hardware, layout, count, gradients):
    """Those of a micro-batch, and those of the tree; experts have them for each rank of the ep group."""
    sizes = [4 * (kind.parameters + kind.expert_parameters) for kind in tiny.kinds]
    costs_of = [LayerCost(0, 0, 0, 0, 0, memory=LayerMemory(backward=size)) for size in sizes]
    inputs = PlanInputs(tiny, hardware, lambda _: costs_of, "fp32")
    costs = CandidateCosts(inputs, Candidate(layout, "1f1b", 1, count, 0))
    total = sum(sizes[kind] for kind in tiny.layers)
    boundaries = 6 * 4 * 128 * 128
    assert passes_peak(costs, 0, 0.0) == pytest.approx(gradients * total, abs=boundaries)


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


@pytest.mark.parametrize("threads", [1, 2])
def test_replicas_hold_the_matrices_that_they_orthogonalise_for_each_other(muon, hardware, monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def more_than_gradients(layout: Layout, shard: str | None = None) -> float:
        inputs = PlanInputs(muon, hardware, saved_costs, "fp32")
        return update_peak(CandidateCosts(inputs, Candidate(layout, "1f1b", 1, 1, 0, shard)), 0, 0.0) / 4

    experts, matrix = 4 * 4 * 2 * 128 * 256, 128 * 256
    assert experts < more_than_gradients(Layout(1, 2, 1)) < 3 * experts
    temporary = threads * (3 * matrix + 2 * 128 * 128)
    assert more_than_gradients(Layout()) == temporary + (experts if threads > 1 else 0)


@pytest.mark.parametrize("layout", [Layout(1, 4, 1), Layout(2, 4, 2)])
def test_replicas_divide_the_parameters(tiny, hardware, layout):
    """Each has a share of weights, moments and sums, and the weights or the gradients of one layer."""
    inputs = PlanInputs(tiny, hardware, lambda _: [LayerCost(0, 0, 0, 0, 0)] * 3, "fp32")
    sizes = []
    for count in (1, 8):
        costs = CandidateCosts(inputs, Candidate(layout, "1f1b", 1, count, 0, "parameters"))
        sizes.append(rank_memory(costs))
    table, block = tiny.config.vocab_size * tiny.config.d_model, tiny.kinds[1]
    for rank, (one, eight) in enumerate(zip(*sizes, strict=True)):
        replicated, experts = costs.parameters(rank)
        share = max(replicated / 4, table) + experts * layout.ep / 4
        assert one - 4 * 3 * share < 4 * (share + 3 * max(table, block.parameters + block.expert_parameters))
        assert eight - one == pytest.approx(4 * 3 * share, rel=0.1)  # three sums


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
        assert rank_memory(costs)[0] - 4 * SAVED == pytest.approx(4 * (3 * trained + weights), abs=10**6)
    assert costs.reduction(0) == 0.0


@pytest.mark.slow
def test_memory_of_steps_on_two_ranks():
    """Compared with torch's profiler, in layouts that differ in what their peak consists of."""
    results = run_function(2, "tests.ranks.memory_ranks", "estimates", timeout=120)
    for case, predicted, measured in results[0]:
        assert predicted == pytest.approx(measured, rel=0.05), case
