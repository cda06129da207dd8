"""Reduction of gradients, their norm, clipping, and tied gradients, on one rank and on four."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fira.parallel import gradients
from fira.parallel.gradients import BUCKET, UNBUCKETED
from fira.parallel.parallelize import ParamShard
from tests.launch import run_function


@functools.cache
def results(layout: tuple[int, int, int]) -> list[dict]:
    return run_function(layout[0] * layout[1], "tests.ranks.gradient_ranks", "check_all", layout=list(layout))


def test_buckets_keep_order_and_are_complete_at_their_size():
    tensors = [torch.empty(size // 4) for size in (BUCKET // 2, BUCKET // 4, BUCKET // 4, 4, BUCKET, 8)]
    buckets = gradients._buckets(tensors)
    assert [len(bucket) for bucket in buckets] == [3, 2, 1]
    assert [id(tensor) for bucket in buckets for tensor in bucket] == [id(tensor) for tensor in tensors]
    assert gradients._buckets([]) == []
    assert UNBUCKETED < BUCKET


def test_bucket_with_one_byte_less_than_its_size_is_not_complete():
    tensors = [torch.empty(size, dtype=torch.uint8, device="meta") for size in (BUCKET, BUCKET - 1, 1, 1)]
    assert [len(bucket) for bucket in gradients._buckets(tensors)] == [1, 2, 1]


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_gradients_are_scaled_in_place(factor):
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for value, parameter in enumerate(parameters, 1):
        parameter.grad = torch.full((2,), float(value))
    gradients.scale_gradients([ParamShard("w", p, 0, (2,), False) for p in parameters], factor)
    assert [p.grad.tolist() for p in parameters] == [[factor] * 2, [2 * factor] * 2]


def test_buckets_are_split_by_device():
    tensors = [torch.empty(2), torch.empty(2, device="meta"), torch.empty(2, device="meta"), torch.empty(2)]
    assert [len(bucket) for bucket in gradients._buckets(tensors)] == [1, 2, 1]


@pytest.mark.parametrize(("dp", "edp"), [(3, 5), (1, 5), (3, 1)])
def test_each_gradient_is_summed_once_over_its_group(monkeypatch, dp: int, edp: int):
    """Of experts over edp, of all others over dp. A group of one rank needs no collective."""
    ranks, used = {"dp": dp, "edp": edp}, set()

    def all_reduce(x: Tensor, group: str) -> None:
        x *= ranks[group]  # all ranks have equal gradients
        used.add(group)

    monkeypatch.setattr(gradients, "dist", SimpleNamespace(get_world_size=ranks.get, all_reduce=all_reduce))
    monkeypatch.setattr(gradients, "UNBUCKETED", 16)
    shards = []
    for expert in (False, True):
        for size in (3, 4, 5, 2):  # 4 float32 are 16 bytes
            parameter = nn.Parameter(torch.zeros(size))
            parameter.grad = torch.arange(1.0, size + 1)
            shards.append(ParamShard("w", parameter, 0, (size,), expert))
    gradients.reduce_gradients(shards, SimpleNamespace(groups={"dp": "dp", "edp": "edp"}))
    for shard in shards:
        factor = edp if shard.expert else dp
        assert shard.parameter.grad.tolist() == [factor * (i + 1) for i in range(shard.shape[0])]
    assert used == {group for group, size in ranks.items() if size > 1}


def test_clipping_scales_gradients_to_the_given_norm():
    """The factor is min(1, clip / (norm + 1e-6)); without clipping it is 1."""
    norms = {}
    for clip, (grad_norm, after) in results((1, 1, 1))[0]["clipped"].items():
        factor = min(1.0, float(clip) / (grad_norm + 1e-6)) if float(clip) else 1.0
        assert after == pytest.approx(grad_norm * factor, rel=1e-10), clip
        norms[clip] = grad_norm
    assert float(np.ptp(list(norms.values()))) == 0
    assert 0.3 < norms["0.3"] < 1e3


def test_norm_vector_has_one_entry_per_parameter_and_expert():
    (single,) = results((1, 1, 1))
    assert single["norms"] == pytest.approx(single["expected_norms"], rel=1e-12)
    assert "layers.1.moe.experts.w1[3]" in single["names"]
    assert len(set(single["names"])) == len(single["names"]) == len(single["norms"])
    for result in results((1, 4, 2)):
        assert result["names"] == single["names"]
        assert result["norms"] == pytest.approx(single["norms"], rel=1e-12)


def test_gradients_are_summed_over_the_replicas_of_each_parameter():
    """Rank r contributes r + 1. In dp 4 × ep 2 experts are replicated on ranks 0 and 2, and on ranks 1 and 3."""
    for rank, result in enumerate(results((1, 4, 2))):
        expert_sum = {0: 1 + 3, 1: 2 + 4}[rank % 2]
        for name, values in result["reduced"].items():
            assert values == [(expert_sum if "expert" in name else 10) * factor for factor in (1, 2)], name


def test_tied_gradients_are_summed_once():
    """On one rank and over a pipeline: the embedding's gradient is the sum of both, the copy's is removed."""
    for layout in ((1, 1, 1), (2, 1, 1)):
        first, last = results(layout)[0], results(layout)[-1]
        assert first["tied"]["grad"] == [5.0, 5.0]
        assert last["tied"]["copy_grad"] is None
        assert last["tied"]["copy"] == [3.0, 3.0]
