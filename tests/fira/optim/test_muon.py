"""Muon against torch.optim.Muon for matrices, and against a loop over experts with singular values in float64."""

from typing import Any

import pytest
import torch

from fira.optim.newton_schulz import flops, orthogonalized
from tests.launch import run_function

ATTENTION = [f"attention.{name}.weight" for name in "koqv"]
EXPERTS = ["moe.experts.w1", "moe.experts.w2"]
ROUTER = "moe.router.gate.weight"
VALUES = "attention.value_embedding.table.weight"


with_ranks = pytest.mark.slow  # a job on two ranks, which imports torch's optimizers


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_function(2, "tests.ranks.muon_ranks", "check_all", timeout=150)


@with_ranks
def test_matrices_equal_torchs_muon_and_others_its_adamw(results):
    for rank in results:
        assert max(rank["torch"].values()) < 1e-12, rank["torch"]


@pytest.mark.parametrize("cautious", [False, True])
@with_ranks
def test_experts_equal_a_loop_over_their_singular_values(results, cautious):
    for rank in results:
        differences = rank["loops"][cautious]
        assert max(differences.values()) < 1e-11, differences
        assert rank["cautious"] > 1e-3  # how much the two cases differ


@with_ranks
def test_each_tensor_is_computed_by_one_rank_and_sent_to_the_other(results):
    """The costs 2, 8, 4, 6, 2 are divided into 8 + 2 + 2 and 6 + 4."""
    first, second = (rank["divided"] for rank in results)
    assert first["computed"] == [0, 1, 4]
    assert second["computed"] == [2, 3]
    values = [[[10.0 + i] * 2] * rows for i, rows in enumerate((1, 4, 2, 3, 1))]
    assert first["results"] == second["results"] == values
    assert first["none"] == second["none"] == 0


@with_ranks
def test_fp32_agrees_within_its_rounding(results):
    for rank in results:
        assert 0 < max(rank["fp32"].values()) < 1e-5


@with_ranks
def test_embeddings_heads_and_routers_are_not_updated_by_muon(results):
    by_rank = [rank["hidden"] for rank in results]
    assert by_rank[0]["fira-tiny"] == {
        "muon": ATTENTION + EXPERTS,
        "adamw": [VALUES, ROUTER, "position.weight", "token.weight"],
        "decayed": [*ATTENTION, *EXPERTS, ROUTER],
    }
    assert by_rank[1]["fira-tiny"] == {
        "muon": ATTENTION + EXPERTS,
        "adamw": [VALUES, ROUTER, "project.weight"],
        "decayed": [*ATTENTION, *EXPERTS, ROUTER, "project.weight"],
    }
    assert by_rank[0]["blues-tiny"]["adamw"] == [VALUES, ROUTER, "token.weight"]
    assert by_rank[1]["blues-tiny"]["adamw"] == [VALUES, ROUTER]
    assert "experts.moe.router.gate.weight" in by_rank[1]["microrwkv-tiny"]["adamw"]
    assert {"experts.project.weight", "time_mix.r.weight"} <= {*by_rank[0]["microrwkv-tiny"]["muon"]}


def test_singular_values_become_about_one_and_vectors_stay():
    torch.manual_seed(1)
    u, s, vh = torch.linalg.svd(torch.randn(3, 12, 20, dtype=torch.float64), full_matrices=False)
    for matrices in (u @ s.diag_embed() @ vh, (u @ s.diag_embed() @ vh).mT):
        found = torch.linalg.svdvals(orthogonalized(matrices, torch.float64))
        assert 0.65 < found.min() < found.max() < 1.25
    projected = u.mT @ orthogonalized(u @ s.diag_embed() @ vh, torch.float64) @ vh.mT
    torch.testing.assert_close(projected, projected.diagonal(dim1=1, dim2=2).diag_embed(), rtol=0, atol=1e-10)


def test_zero_stays_zero_and_the_dtype_is_that_of_the_matrix():
    assert not orthogonalized(torch.zeros(3, 4), torch.float32).any()
    result = orthogonalized(torch.eye(4), torch.bfloat16)
    assert result.dtype is torch.float32
    torch.testing.assert_close(result, torch.eye(4), rtol=0, atol=0.35)


def test_flops_are_those_of_the_products():
    """Counted by torch for 128 × 256 and its transpose, and for experts."""
    from torch.utils.flop_counter import FlopCounterMode

    for shape in ((128, 256), (256, 128), (3, 8, 4)):
        with FlopCounterMode(display=False) as counter:
            orthogonalized(torch.randn(shape), torch.float32)
        assert flops(torch.Size(shape)) == counter.get_total_flops()
