"""Auxiliary losses of a MoE layer.

Each is a function (routed, outputs, valid) → [B], one loss per sequence. Its arguments are routed […] with [B, T, …],
outputs, a function that returns the outputs of the chosen experts [B, T, k, h], and valid [B, T]. Means are over the
valid tokens of one sequence, so that the loss does not depend on how a batch is split into micro-batches. The objective
weights each sequence by its number of tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fira.nn.moe.router import Routed

Outputs = Callable[[], Tensor]
AuxLoss = Callable[[Routed, Outputs, Tensor], Tensor]


def even_weights(routed: Routed, outputs: Outputs, valid: Tensor) -> Tensor:
    """Σ_e (mean_t p_e − 1/E)²; p_e is a token's weight for expert e, zero if it is not chosen."""
    return (_per_expert(routed, routed.weights, valid) - 1 / routed.logits.shape[-1]).square().sum(1)


def load_balance(routed: Routed, outputs: Outputs, valid: Tensor) -> Tensor:
    """E · Σ_e f_e P_e (Fedus et al. 2021, arXiv 2101.03961): f_e assignments per token, P_e mean probability.

    The minimum is k. transformers' `load_balancing_loss_func` averages f and P over all layers and the whole batch, so
    that imbalances of different layers can cancel, and the loss needs the last stage. Here each layer and sequence has
    its own loss; with one layer and one sequence the two are equal.
    """
    assigned = _per_expert(routed, torch.ones_like(routed.weights), valid)
    return routed.logits.shape[-1] * (assigned * _mean(routed.logits.softmax(dim=-1), valid)).sum(1)


def router_z(routed: Routed, outputs: Outputs, valid: Tensor) -> Tensor:
    """Router z-loss, mean_t (log Σ_e exp logit_e)², which limits the logits (Zoph et al. 2022, arXiv 2202.08906)."""
    return _mean(routed.logits.logsumexp(dim=-1, keepdim=True).square(), valid).squeeze(1)


def small_outputs(routed: Routed, outputs: Outputs, valid: Tensor) -> Tensor:
    """Mean over experts and channels of (mean_t output)²; the output of an expert that is not chosen is zero."""
    chosen = outputs()
    batch, _, _, width = chosen.shape
    num_experts = routed.logits.shape[-1]
    rows = (chosen * valid[..., None, None]).flatten(1, 2).to(routed.logits.dtype)  # full precision also under autocast
    index = routed.experts.flatten(1)[..., None].expand_as(rows)
    summed = rows.new_zeros(batch, num_experts, width).scatter_add(1, index, rows)
    return (summed / _tokens(valid)[..., None]).square().mean((1, 2))


def _tokens(valid: Tensor) -> Tensor:
    """[B, 1], the number of valid tokens, at least one."""
    return valid.sum(1, keepdim=True).clamp(min=1)


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    """[B, T, C] → [B, C], the mean over the valid tokens."""
    return (x * valid[..., None]).sum(1) / _tokens(valid)


def _per_expert(routed: Routed, values: Tensor, valid: Tensor) -> Tensor:
    """values [B, T, k] of the chosen experts → [B, E], their sums divided by the number of valid tokens."""
    values = values * valid[..., None]
    zeros = torch.zeros_like(routed.logits[:, 0])
    return zeros.scatter_add(1, routed.experts.flatten(1), values.flatten(1)) / _tokens(valid)
