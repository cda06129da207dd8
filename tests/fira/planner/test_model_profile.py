"""The profile of a model, what Muon updates in it, and the memory that its layers' backward needs."""

from typing import Any

import pytest
import torch

from fira.models.registry import make_config
from fira.nn.cross_entropy import LOGITS
from fira.planner import memory
from fira.planner.best_candidates import memory_only
from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate
from fira.planner.costs import LayerCost
from fira.planner.model_profile import layer_memory, logits_bytes, profile_of
from pipeline.mesh import Layout
from tests.launch import run_function
from tests.ranks.planner_ranks import meta_model

MODELS: list[dict[str, Any]] = [
    {"preset": "fira-tiny", "changes": {"value_embeddings": True}},
    {"preset": "mooshak-tiny"},
    {"preset": "microrwkv-tiny"},  # with a tied embedding
    {"preset": "fira-tiny", "lora": "rank=2,alpha=4,targets=attention+experts+head"},
    {"preset": "blues-tiny", "lora": "rank=2,alpha=4,targets=attention"},  # with a tied embedding that is not trained
]
PLACES: list[dict[str, Any]] = [
    {"layout": [2, 1, 1], "shard": None},
    {"layout": [1, 2, 1], "shard": "optimizer"},
    {"layout": [1, 2, 2], "shard": None},
]


def test_profile_of_tiny(tiny):
    assert tiny.layers == [0, 1, 1, 1, 1, 2]
    assert (tiny.tokens, tiny.width, tiny.num_experts) == (tiny.config.seq_len, tiny.config.d_model, 4)
    embedding, block, head = tiny.kinds
    assert embedding.expert_parameters == head.expert_parameters == embedding.moe_layers == 0
    experts = {name: p for name, p in block.layer.named_parameters() if ".experts." in f".{name}"}
    assert block.expert_parameters == sum(p.numel() for p in experts.values())
    assert block.parameters == sum(p.numel() for p in block.layer.parameters()) - block.expert_parameters
    assert (block.moe_layers, block.top_k) == (1, tiny.config.top_k)
    assert block.largest == max(p.numel() for p in block.layer.parameters())
    assert not any(kind.hidden for kind in tiny.kinds)  # without Muon


def test_hidden_matrices_and_moments_are_those_of_the_optimizer():
    """On two ranks, of which one has the first half of the layers, or which update different parameters."""
    cases = [
        model | place
        for model in MODELS
        for place in PLACES
        if place["layout"][2] == 1 or hasattr(make_config(model["preset"], {}), "num_experts")
    ]
    results = run_function(2, "tests.ranks.planner_ranks", "updates", timeout=120, cases=cases)
    for case, *by_rank in zip(cases, *results, strict=True):
        model = meta_model(**{name: case[name] for name in case if name not in ("layout", "shard")})
        layout, profile = Layout(*case["layout"]), profile_of(model, "muon")
        unknown = [LayerCost(0.0, 0.0, 0.0, 0.0, 0.0)] * len(profile.kinds)
        inputs = PlanInputs(profile, memory_only(0.0, "fp32", 2, "cpu"), lambda _, costs=unknown: costs, "fp32")
        costs = CandidateCosts(inputs, Candidate(layout, "1f1b", 1, 1, 0, case["shard"]))
        for rank in range(layout.pp):
            replicas = by_rank[rank * layout.dp :][: layout.dp]
            hidden = [[*p.shape] for i in costs.rank_layers[rank] for p in costs.layer_kinds[i].hidden]
            assert all(sorted(hidden) == replica["hidden"] for replica in replicas), case
            moments = memory._owned(costs, rank, lambda p: p.moments)
            assert moments == max(replica["moments"] for replica in replicas), case


def test_copies_of_weights_for_autocast_are_not_saved_per_micro_batch(tiny):
    """Under autocast a block saves about half of the bytes; its copies of weights are larger than these."""
    single, double = (layer_memory(tiny, 1, size, torch.bfloat16).saved for size in (1, 2))
    assert single == pytest.approx(double - single, rel=0.02)  # no part that does not depend on the micro-batch
    assert 0 < single < layer_memory(tiny, 1, 1).saved


def test_logits_bytes_are_limited_by_the_tokens_processed_at_a_time(tiny):
    vocab_size = tiny.config.vocab_size
    assert logits_bytes(tiny, 1, "cpu") == 12 * min(128, max(256, LOGITS["cpu"] // vocab_size)) * vocab_size
    assert logits_bytes(tiny, 10**6, "cpu") == 12 * max(256, LOGITS["cpu"] // vocab_size) * vocab_size
