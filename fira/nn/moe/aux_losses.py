"""Losses that a MoE layer adds to the objective.

Each is a function (routed, outputs, valid) → [B], one loss per sequence: routed as [B, T, …], valid [B, T], and outputs
a function that brings together what the chosen experts gave, [B, T, k, h], for who wants to look at it. Its means run
over the valid tokens of one sequence, because a mean over a micro-batch would make the loss depend on how the batch is
cut; the objective then weighs a sequence by its tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fira.nn.moe.router import Routed

Outputs = Callable[[], Tensor]
AuxLoss = Callable[[Routed, Outputs, Tensor], Tensor]


def even_weights(routed: Routed, outputs: Outputs, valid: Tensor) -> Tensor:
    """Σ_e (mean_t p_e − 1/E)²; p_e is a token's weight for expert e, zero where not chosen."""
    return (_per_expert(routed, routed.weights, valid) - 1 / routed.logits.shape[-1]).square().sum(1)


def load_balance(routed: Routed, outputs: Outputs, valid: Tensor) -> Tensor:
    """E · Σ_e f_e P_e (Fedus et al. 2021, arXiv 2101.03961): f_e assignments per token, P_e mean probability; ≥ k.

    transformers' `load_balancing_loss_func` first takes f and P as means over all layers and the whole batch. Then one
    layer's collapse can hide behind another's, and the loss is known only when the last stage is through. Here each
    layer and sequence has its own; with one layer and one sequence the two are equal.
    """
    assigned = _per_expert(routed, torch.ones_like(routed.weights), valid)
    return routed.logits.shape[-1] * (assigned * _mean(routed.logits.softmax(dim=-1), valid)).sum(1)


def router_z(routed: Routed, outputs: Outputs, valid: Tensor) -> Tensor:
    """mean_t (log Σ_e exp logit_e)², which keeps logits small (Zoph et al. 2022, arXiv 2202.08906)."""
    return _mean(routed.logits.logsumexp(dim=-1, keepdim=True).square(), valid).squeeze(1)


def small_outputs(routed: Routed, outputs: Outputs, valid: Tensor) -> Tensor:
    """Mean over experts and channels of (mean_t output)²; an expert that was not chosen has an output of zero."""
    given = outputs()
    batch, _, _, width = given.shape
    num_experts = routed.logits.shape[-1]
    rows = (given * valid[..., None, None]).flatten(1, 2).to(routed.logits.dtype)  # sums, also under autocast
    places = routed.experts.flatten(1)[..., None].expand_as(rows)
    summed = rows.new_zeros(batch, num_experts, width).scatter_add(1, places, rows)
    return (summed / _tokens(valid)[..., None]).square().mean((1, 2))


def _tokens(valid: Tensor) -> Tensor:
    """[B, 1], at least one."""
    return valid.sum(1, keepdim=True).clamp(min=1)


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    """[B, T, C] → [B, C] over the valid tokens."""
    return (x * valid[..., None]).sum(1) / _tokens(valid)


def _per_expert(routed: Routed, values: Tensor, valid: Tensor) -> Tensor:
    """values [B, T, k] of the chosen experts → [B, E], per valid token."""
    values = values * valid[..., None]
    zeros = torch.zeros_like(routed.logits[:, 0])
    return zeros.scatter_add(1, routed.experts.flatten(1), values.flatten(1)) / _tokens(valid)
