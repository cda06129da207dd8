"""What each rank of the expert-parallel tests runs: experts that multiply by a number, and layers in two parts."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.nn.context import Context, TrainingContext
from fira.nn.moe.aux_losses import even_weights
from fira.nn.moe.dispatcher import TokenDispatcher
from fira.nn.moe.experts import Experts
from fira.nn.moe.grouped_linear import RowGroups
from fira.nn.moe.layer import MoE
from fira.nn.moe.permutation import weighted_sum
from fira.nn.moe.router import Router
from fira.parallel.expert_parallel import AllToAllDispatcher
from pipeline.split_backward import SplitBackward


def exchange(cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Send tokens to experts of which number e multiplies by e + 1: in one part and in two, by case."""
    rank = dist.get_rank()
    own = [{name: values[rank] for name, values in case.items()} for case in cases]
    return [[_exchange(parts, **case) for case in own] for parts in (1, 2)]


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


# Rows are a multiple of 128 bytes. On a CPU the rounding of a product depends on the alignment of its operands, and
# that of an elementwise function on whether an element is in the last, incomplete vector of a tensor.
EXPERTS, WIDTH, HIDDEN, SHAPE = 8, 16, 16, (2, 7)


def layers_in_parts(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By case, see `_layer_in_parts`."""
    return [_layer_in_parts(**case) for case in cases]


def _layer_in_parts(split: bool, **settings: Any) -> dict[str, Any]:
    """Compare an MoE layer in two parts with the same in one part, and with all experts on this rank.

    split: with a split backward. settings: see `_layer`. Experts 1 to 3 are never chosen.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(*SHAPE, WIDTH, dtype=torch.float64, generator=generator)
    factor = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    keys = torch.randint(-(2**31), 2**31, SHAPE, generator=generator).to(torch.int32)
    local = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)

    def run(dispatcher: TokenDispatcher, shard: slice) -> list[Tensor]:
        """Output and gradients of the input, of the experts in `local`, and of the router."""
        moe = _layer(shard, **settings)
        moe.dispatcher = dispatcher
        training = TrainingContext(aux_weights=torch.ones(SHAPE[0], dtype=torch.float64))
        given = x.clone().requires_grad_()
        y = moe(given, Context(training=training), keys)
        if split:
            backward = SplitBackward(y, given)
            grad_x = backward.backward_input(factor)
            backward.backward_weight()
        else:
            y.backward(factor)
            assert given.grad is not None
            grad_x = given.grad
        experts = [gradient_of(p) for p in moe.experts.parameters()]
        if shard != local:
            for gradient in experts:
                dist.all_reduce(gradient)
            experts = [gradient[local] for gradient in experts]
        return [y.detach(), grad_x, *experts, *map(gradient_of, moe.router.parameters())]

    one, two = (run(AllToAllDispatcher(dist.group.WORLD, parts), local) for parts in (1, 2))
    whole = run(TokenDispatcher(), slice(EXPERTS))
    return {
        "distance of parts": [float((a - b).abs().max()) for a, b in zip(one, two, strict=True)],
        "distance of ranks": [float((a - b).abs().max()) for a, b in zip(two, whole, strict=True)],
        "sizes": [float(a.abs().max()) for a in whole],
    }


def _layer(experts: slice, dropout: float, capacity: float) -> MoE:
    """A layer of 8 experts, of which it has only some. Its weights do not depend on which."""
    torch.manual_seed(0)
    bank = Experts(EXPERTS, WIDTH, HIDDEN, dropout, "experts")
    moe = MoE(Router(WIDTH, EXPERTS, 2), bank, EXPERTS, 1, [(even_weights, 0.1)], capacity_factor=capacity).double()
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        moe.router.gate.bias[1:4] = -1e3
    for name, parameter in list(bank.named_parameters()):
        setattr(bank, name, nn.Parameter(parameter.detach()[experts].clone()))
    return moe


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
