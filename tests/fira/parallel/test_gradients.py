"""The norm of gradients, clipping, and tied gradients, on one rank and on four."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from fira.parallel import gradients
from fira.parallel.param_shard import ParamShard
from tests.launch import run_function


@functools.cache
def results(layout: tuple[int, int, int]) -> list[dict]:
    return run_function(layout[0] * layout[1], "tests.ranks.gradient_ranks", "check_all", layout=list(layout))


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_gradients_are_scaled_in_place(factor):
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for value, parameter in enumerate(parameters, 1):
        parameter.grad = torch.full((2,), float(value))
    gradients.scale_gradients([ParamShard("w", p, 0, (2,), False, p) for p in parameters], factor)
    assert [p.grad.tolist() for p in parameters] == [[factor] * 2, [2 * factor] * 2]


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


def test_tied_gradients_are_summed_once():
    """On one rank and over a pipeline: the embedding's gradient is the sum of both, the copy's is removed."""
    for layout in ((1, 1, 1), (2, 1, 1)):
        first, last = results(layout)[0], results(layout)[-1]
        assert first["tied"]["grad"] == [5.0, 5.0]
        assert last["tied"]["copy_grad"] is None
        assert last["tied"]["copy"] == [3.0, 3.0]
