"""Fixtures of the planner's tests: a profile of fira-tiny, and hardware with round numbers."""

import pytest
import torch

from fira.models.registry import build, make_config
from fira.planner.costs import LayerCost
from fira.planner.device_specs import Hardware, Link
from fira.planner.model_profile import ModelProfile, profile_of

OPERATIONS = ("p2p", "all_to_all", "all_reduce")


@pytest.fixture(scope="session")
def tiny() -> ModelProfile:
    """Embedding, four blocks with four experts each, head; 128 tokens of width 128."""
    with torch.device("meta"):
        return profile_of(build(make_config("fira-tiny", {"value_embeddings": False})))


@pytest.fixture(scope="session")
def muon() -> ModelProfile:
    """The same model, which is trained by Muon."""
    with torch.device("meta"):
        return profile_of(build(make_config("fira-tiny", {"value_embeddings": False})), "muon")


@pytest.fixture(scope="session")
def hardware() -> Hardware:
    return Hardware(
        name="paper",
        memory=1e9,
        memory_bandwidth=1e11,
        flops={"fp32": 1e12},
        seconds_per_layer=1e-6,
        ranks_per_node=2,
        inside=dict.fromkeys(OPERATIONS, Link(1e-5, 1e10)),
        between=dict.fromkeys(OPERATIONS, Link(1e-4, 1e9)),
        overlaps_collectives=False,
    )


@pytest.fixture(scope="session")
def round_costs():
    """Cost model of embedding, block and head: forward, backward_input and backward_weight in ms."""

    def cost_model(microbatch: int) -> list[LayerCost]:
        kinds = [(1, 0, 1), (4, 4, 3), (2, 2, 2)]
        return [LayerCost(f * 1e-3, i * 1e-3, w * 1e-3, (i + w) * 1e-3, 1e-3) for f, i, w in kinds]

    return cost_model
