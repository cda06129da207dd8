"""What each rank of the expert-parallel tests runs: dispatch, experts that multiply by a number, and combine."""

from typing import Any

import torch
import torch.distributed as dist

from fira.nn.moe.permutation import weighted_sum
from fira.parallel.expert_parallel import AllToAllDispatcher


def exchange(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Send tokens to experts of which number e multiplies by e + 1; by case, see `_exchange`."""
    return [_exchange(**{name: values[dist.get_rank()] for name, values in case.items()}) for case in cases]


def _exchange(experts: list[list[int]], tokens: list[list[float]], weights: list[list[float]]) -> dict[str, Any]:
    """experts [N, k] of 6 (6: dropped), tokens [N, d], weights [N, k] → what arrives, the outputs and the gradients."""
    dispatcher = AllToAllDispatcher(dist.group.WORLD)
    local = 6 // dispatcher.ranks
    x = torch.tensor(tokens, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor(experts)
    plan = dispatcher.plan(chosen, 6, dropped=True)
    rows = dispatcher.dispatch(x, plan, chosen.shape[1])
    numbers = dispatcher.dispatch(chosen.flatten(), plan)
    factors = [local * dist.get_rank() + e + 1 for e, count in plan.groups.sizes.items() for _ in range(count)]
    outputs = dispatcher.combine(rows * torch.tensor(factors, dtype=torch.float64)[:, None], plan)
    y = weighted_sum(outputs, w, plan.order, plan.inverse)
    (y * torch.arange(1, len(x) + 1)[:, None]).sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    assert plan.groups.counts is not None
    assert [*plan.groups.sizes.values()] == plan.groups.counts.tolist()
    return {
        "rows": rows.tolist(),
        "numbers": numbers.tolist(),
        "y": y.tolist(),
        "grad_x": x.grad.tolist(),
        "grad_w": w.grad.tolist(),
    }
