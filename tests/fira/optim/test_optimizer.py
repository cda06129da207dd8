"""AdamW against torch.optim's, the learning rate's corners, and the loss scale."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from fira.optim.adamw import AdamW
from fira.optim.loss_scale import LossScale
from fira.optim.lr_schedule import learning_rate
from fira.parallel.parallelize import ParamShard
from tests.launch import ROOT


def test_adamw_is_torchs_and_decays_matrices_only():
    torch.manual_seed(0)
    shapes = {"weight": (3, 4), "bias": (4,), "experts.w1": (2, 3, 4), "experts.b1": (2, 3)}
    ours = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    theirs = {name: nn.Parameter(value.detach().clone()) for name, value in ours.items()}
    parts = [ParamShard(name, ours[name], 0, shape, name.startswith("experts")) for name, shape in shapes.items()]
    optimizer = AdamW(ours, {part.name for part in parts if part.is_matrix}, weight_decay=0.3)
    groups = [
        {"params": [theirs["weight"], theirs["experts.w1"]], "weight_decay": 0.3},
        {"params": [theirs["bias"], theirs["experts.b1"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(5):
        for name in shapes:
            ours[name].grad = torch.randn(shapes[name])
            theirs[name].grad = ours[name].grad.clone()
        reference.param_groups[0]["lr"] = reference.param_groups[1]["lr"] = 0.1 / (step + 1)
        optimizer.step(0.1 / (step + 1))
        reference.step()
    for name in shapes:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def test_training_does_not_import_torchs_compiler():
    """Nor what that is made of: it costs up to two seconds on every rank, and ours need not pay them."""
    code = (
        "import sys, pipeline; from tests.ranks.parity_ranks import train\n"
        "pipeline.init(); train([1, 1, 1], steps=1)\n"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_learning_rate():
    rates = [learning_rate(step, 100, 1.0, 0.1, 10) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[54] == pytest.approx(0.55)  # half-way between step 10 and step 100
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(120, 100, 1.0, 0.1, 10) == pytest.approx(0.1)


def test_loss_scale_halves_on_overflow_and_grows_after_a_thousand_good_steps():
    scale = LossScale(enabled=True)
    start = scale.value
    scale.update(overflow=True)
    assert scale.value == start / 2
    for _ in range(999):
        scale.update(overflow=False)
    assert scale.value == start / 2
    scale.update(overflow=False)
    assert scale.value == start
    assert math.isclose(LossScale(enabled=False).value, 1.0)
