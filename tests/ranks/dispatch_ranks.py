"""What each rank of the expert-parallel tests runs: dispatch, experts that multiply by a number, and combine."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fira.nn.moe.grouped_linear import RowGroups
from fira.nn.moe.permutation import weighted_sum
from fira.parallel.expert_parallel import AllToAllDispatcher


def exchange(cases: list[dict[str, Any]], parts: int) -> list[dict[str, Any]]:
    """Send tokens to experts of which number e multiplies by e + 1; by case, see `_exchange`."""
    rank = dist.get_rank()
    return [_exchange(parts, **{name: values[rank] for name, values in case.items()}) for case in cases]


def _exchange(
    parts: int, experts: list[list[int]], tokens: list[list[float]], weights: list[list[float]]
) -> dict[str, Any]:
    """experts [N, k] of 6 (6: dropped), tokens [N, d], weights [N, k] → what arrives, the outputs and the gradients."""
    dispatcher = AllToAllDispatcher(dist.group.WORLD, parts)
    local = 6 // dispatcher.ranks
    x = torch.tensor(tokens, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor(experts)
    plan = dispatcher.plan(chosen, 6, dropped=True)
    arrived: dict[str, list[Any]] = {"rows": [], "numbers": []}

    def multiply(rows: Tensor, groups: RowGroups, numbers: Tensor | None) -> Tensor:
        assert numbers is not None
        assert groups.counts is not None
        counts = groups.counts.tolist()
        assert counts == [groups.sizes.get(e, 0) for e in range(local)]
        arrived["rows"] += rows.tolist()
        arrived["numbers"] += numbers.tolist()
        factors = [local * dist.get_rank() + e + 1 for e, count in enumerate(counts) for _ in range(count)]
        return rows * torch.tensor(factors, dtype=torch.float64)[:, None]

    outputs = dispatcher.run(x, chosen.flatten(), plan, chosen.shape[1], multiply)
    y = weighted_sum(outputs, w, plan.order, plan.inverse)
    (y * torch.arange(1, len(x) + 1)[:, None]).sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    return {**arrived, "y": y.tolist(), "grad_x": x.grad.tolist(), "grad_w": w.grad.tolist()}
