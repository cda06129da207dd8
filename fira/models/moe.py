"""Mixture of experts: router → dispatch → experts → combine (Shazeer et al. 2017; dropless as in MegaBlocks, 2022).

Router, dispatcher and experts are siblings that know nothing of one another. The dispatcher here keeps tokens on
their rank; the one that sends them to other ranks has the same three methods and is put in by `fira.parallelize`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fira.models.context import Context, MoEStats
from fira.models.dropout import Dropout


class Router(nn.Module):
    """Token-choice top-k with the softmax over the kept logits: g = (W x + b) / temperature."""

    def __init__(self, d_model: int, num_experts: int, top_k: int | float, temperature: float = 0.9) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, num_experts)
        self.temperature = temperature
        # 0.8 of 4 experts are 3; a little is added because 15/22 of 22 is just below 15 in floating point
        self.top_k = top_k if isinstance(top_k, int) else max(1, int(top_k * num_experts + 1e-9))
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(f"top_k {top_k} does not choose between 1 and {num_experts} experts")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [N, d] → the chosen experts [N, k] and their weights [N, k], which sum to one."""
        # Routing is decided in full precision: a rounding error here sends a token elsewhere.
        with torch.autocast(x.device.type, enabled=False):
            logits = self.gate(x.to(self.gate.weight.dtype)) / self.temperature
            kept, experts = logits.topk(self.top_k, dim=-1)
            return experts, kept.softmax(dim=-1)


class _Gather(torch.autograd.Function):
    """Rows x[order // copies]. Given the inverse of `order`, the backward is a gather as well, and no scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies if copies > 1 else order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


@dataclass(frozen=True)
class Plan:
    """Who goes where: `order` sorts the N·k assignments by expert, `inverse` puts them back."""

    order: Tensor
    inverse: Tensor
    counts: list[int]  # rows for each expert that is computed here


def sort_by_expert(experts: Tensor) -> tuple[Tensor, Tensor]:
    """Expert numbers [n] → a stable order that sorts them, and its inverse."""
    order = experts.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return order, inverse


def gather_rows(x: Tensor, order: Tensor, inverse: Tensor, copies: int = 1) -> Tensor:
    """Rows of x, each standing `copies` times in a row, in the given order. Differentiable in x."""
    return _Gather.apply(x, order, inverse, copies)


class TokenDispatcher:
    """Brings each token's row to its experts, and the results back. All experts are on this rank."""

    def plan(self, experts: Tensor, num_experts: int) -> Plan:
        """experts: [N, k] chosen experts."""
        flat = experts.flatten()
        return Plan(*sort_by_expert(flat), flat.bincount(minlength=num_experts).tolist())

    def dispatch(self, rows: Tensor, plan: Plan, copies: int = 1) -> Tensor:
        """[N·k / copies, …] → [N·k, …] sorted by expert; copies = k sends one row to all k experts of its token."""
        return gather_rows(rows, plan.order, plan.inverse, copies)

    def combine(self, rows: Tensor, plan: Plan) -> Tensor:
        """[N·k, …] sorted by expert → [N·k, …] as the tokens stood."""
        return gather_rows(rows, plan.inverse, plan.order)


class Experts(nn.Module):
    """W2 drop(gelu(W1 x + b1)) + b2, with weights of its own for each expert; dim 0 of a parameter is the expert."""

    def __init__(self, num_experts: int, d_model: int, d_ff: int, dropout: float, name: str) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.b1 = nn.Parameter(torch.empty(num_experts, d_ff))
        self.w2 = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.b2 = nn.Parameter(torch.empty(num_experts, d_model))
        self.dropout = Dropout(dropout, f"{name}.dropout")

    def init_parameter(self, name: str, one: Tensor, generator: torch.Generator) -> None:
        """Fill one expert's slice as torch.nn.Linear does: uniform in ±1/√fan_in."""
        fan_in = self.w1.shape[2] if name in ("w1", "b1") else self.w2.shape[2]
        one.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)

    def forward(self, x: Tensor, counts: list[int], keys: Tensor | None) -> Tensor:
        """x: [n, d] sorted by expert, counts[e] rows for expert e; keys: [n] int32 for dropout → [n, d].

        An expert without a row takes part with none, so every parameter gets a gradient on every rank.
        """
        hidden = [F.linear(rows, w, b) for rows, w, b in zip(x.split(counts), self.w1, self.b1, strict=True)]
        h = self.dropout(F.gelu(torch.cat(hidden)), keys)
        return torch.cat([F.linear(rows, w, b) for rows, w, b in zip(h.split(counts), self.w2, self.b2, strict=True)])


class _AddToObjective(torch.autograd.Function):
    """Identity in x whose backward gives `loss` the gradient one, as if it had been added to the training loss.

    So the auxiliary loss needs no way to the last stage: it is trained where it arises.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


def balance_loss(experts: Tensor, weights: Tensor, valid: Tensor, num_experts: int) -> Tensor:
    """Σ_e (mean_tokens p_e − 1/E)² of each sequence; p_e is a token's weight for expert e, zero where not chosen.

    experts, weights: [B, T, k], valid: [B, T] → [B]. The mean runs over the valid tokens of one sequence, because a
    mean over a micro-batch would make the loss depend on how the batch is cut.
    """
    weights = weights * valid[..., None]
    mass = weights.new_zeros(len(experts), num_experts).scatter_add(1, experts.flatten(1), weights.flatten(1))
    share = mass / valid.sum(1, keepdim=True).clamp(min=1)
    return (share - 1 / num_experts).square().sum(1)


class MoE(nn.Module):
    """y = Σ_e p_e · expert_e(x) over the chosen experts; adds its balance loss to the objective and notes the load.

    index: the layer's number, under which its statistics are found. name: global, for dropout.
    """

    def __init__(self, router: Router, experts: Experts, num_experts: int, index: int, aux_coefficient: float) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = TokenDispatcher()
        self.num_experts = num_experts
        self.index = index
        self.aux_coefficient = aux_coefficient

    def forward(self, x: Tensor, context: Context, keys: Tensor | None) -> Tensor:
        """x: [B, T, d], keys: [B, T] int32 for dropout inside the experts → [B, T, d]."""
        tokens = x.flatten(0, 1)
        experts, weights = self.router(tokens)
        top_k = experts.shape[1]
        plan = self.dispatcher.plan(experts, self.num_experts)
        if keys is not None:  # a token has another mask in each of its experts
            keys = self.dispatcher.dispatch((keys.flatten()[:, None] + experts.to(torch.int32)).flatten(), plan)
        rows = self.experts(self.dispatcher.dispatch(tokens, plan, top_k), plan.counts, keys)
        chosen = self.dispatcher.combine(rows, plan).unflatten(0, (-1, top_k))
        y = (chosen * weights[..., None]).sum(1).view_as(x)
        return self._balance(y, experts, weights, context)

    def _balance(self, y: Tensor, experts: Tensor, weights: Tensor, context: Context) -> Tensor:
        if context.aux_weights is None:
            return y
        batch, length = y.shape[:2]
        experts, weights = experts.view(batch, length, -1), weights.view(batch, length, -1)
        valid = context.valid(y)
        each = balance_loss(experts, weights, valid, self.num_experts) * self.aux_coefficient
        aux = (each * context.aux_weights).sum()
        counted = valid[..., None].expand_as(experts).flatten().long()
        load = counted.new_zeros(self.num_experts).scatter_add_(0, experts.flatten(), counted)
        context.stats[self.index, context.part] = MoEStats(load, aux.detach())
        return _AddToObjective.apply(y, aux)

    @staticmethod
    def flops_per_token(d_model: int, d_ff: int, num_experts: int, top_k: int) -> float:
        """Forward FLOPs per token: the router and the chosen experts."""
        return 2.0 * d_model * num_experts + 4.0 * d_model * d_ff * top_k
