"""AdamW against torch.optim.AdamW."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from fira.optim.adamw import AdamW
from fira.optim.settings import OptimizerSettings
from fira.parallel.param_shard import ParamShard
from tests.launch import ROOT


def test_adamw_equals_torch_and_decays_matrices_only():
    torch.manual_seed(0)
    shapes = {"weight": (3, 4), "bias": (4,), "experts.w1": (2, 3, 4), "experts.b1": (2, 3)}
    ours = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    theirs = {name: nn.Parameter(value.detach().clone()) for name, value in ours.items()}
    experts = {name for name in shapes if name.startswith("experts")}
    shards = [ParamShard(name, ours[name], 0, shape, name in experts, ours[name]) for name, shape in shapes.items()]
    matrices = {shard.name for shard in shards if shard.is_matrix}
    optimizer = AdamW(ours, matrices, OptimizerSettings(weight_decay=0.3), stacked=experts)
    groups = [
        {"params": [theirs["weight"], theirs["experts.w1"]], "weight_decay": 0.3},
        {"params": [theirs["bias"], theirs["experts.b1"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(5):
        for name in shapes:
            ours[name].grad = torch.randn(shapes[name]) * 1e-6  # small enough for eps = 1e-8 to matter
            theirs[name].grad = ours[name].grad.clone()
        reference.param_groups[0]["lr"] = reference.param_groups[1]["lr"] = 0.1 / (step + 1)
        optimizer.step(0.1 / (step + 1))
        reference.step()
    assert optimizer.updates == 5
    for name in shapes:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
        exp_avg, exp_avg_sq = optimizer.moments[name]
        torch.testing.assert_close(exp_avg, reference.state[theirs[name]]["exp_avg"], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(exp_avg_sq, reference.state[theirs[name]]["exp_avg_sq"], rtol=1e-6, atol=1e-18)


@pytest.mark.parametrize(("decayed", "expected"), [({"w"}, 0.95), (set(), 1.0)])
def test_one_of_the_two_groups_may_be_empty(decayed, expected):
    """With a gradient of one, the update is the learning rate."""
    for grad in (0.0, 1.0):
        parameter = nn.Parameter(torch.ones(2, 2))
        parameter.grad = torch.full((2, 2), grad)
        AdamW({"w": parameter}, decayed, OptimizerSettings(weight_decay=0.5)).step(0.1)
        torch.testing.assert_close(parameter, torch.full((2, 2), expected - 0.1 * grad))


def test_every_setting_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(2))
    settings = OptimizerSettings(beta1=0.5, beta2=0.7, eps=0.3, weight_decay=0.2)
    optimizer = AdamW({"w": ours}, {"w"}, settings)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.5, 0.7), eps=0.3, weight_decay=0.2)
    for _ in range(3):
        ours.grad = torch.randn(3, 4, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        optimizer.step(0.1)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_factors_of_the_learning_rate_are_those_of_torchs_groups():
    torch.manual_seed(0)
    names = ("embedding", "router", "other")
    ours, theirs = ({name: nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for name in names} for _ in range(2))
    settings = OptimizerSettings(weight_decay=0.2)
    optimizer = AdamW(ours, {"embedding", "other"}, settings, lr_scales={"embedding": 3.0, "router": 0.25})
    groups = [
        {"params": [theirs["embedding"]], "lr": 0.3, "weight_decay": 0.2},
        {"params": [theirs["router"]], "lr": 0.025, "weight_decay": 0.0},
        {"params": [theirs["other"]], "lr": 0.1, "weight_decay": 0.2},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for _ in range(3):
        for name in names:
            ours[name].grad = torch.randn(3, 4, dtype=torch.float64)
            theirs[name].grad = ours[name].grad.clone()
        optimizer.step(0.1)
        reference.step()
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-13, atol=1e-13)


def test_cautious_decay_applies_where_the_update_decreases_the_weight():
    """Against the formulas of AdamW, written out. Parameters that are not decayed stay as they are."""
    torch.manual_seed(0)
    settings = OptimizerSettings(weight_decay=0.5, cautious_decay=True)
    parameters = {name: nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for name in ("w", "bias")}
    expected = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    m, v = ({name: torch.zeros(3, 4, dtype=torch.float64) for name in parameters} for _ in range(2))
    optimizer = AdamW(parameters, {"w"}, settings)
    for step in range(1, 5):
        for name, parameter in parameters.items():
            g = parameter.grad = torch.randn(3, 4, dtype=torch.float64)
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.95 * v[name] + 0.05 * g**2
            update = m[name] / (1 - 0.9**step) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            decayed = 0.5 * expected[name] * (update * expected[name] >= 0) if name == "w" else 0.0
            expected[name] = expected[name] - 0.1 * (update + decayed)
        optimizer.step(0.1)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_training_does_not_import_torchs_compiler():
    """torch._dynamo and sympy take up to two seconds to import on every rank."""
    code = (
        "import sys, torch.utils.checkpoint; known = set(sys.modules)\n"  # torch 2.6 imports sympy here
        "import pipeline; from tests.ranks.parity_ranks import train\n"
        "pipeline.init(); train([1, 1, 1], steps=1)\n"
        "assert not {'torch._dynamo', 'sympy'} & (set(sys.modules) - known)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
