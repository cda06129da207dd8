"""Auxiliary losses of a MoE layer.

Each is a function (routed, outputs, means) → [S], one loss per sequence, or per document. Its arguments are routed […]
with [B, T, …], outputs, a function that returns the outputs of the chosen experts [B, T, k, h], and means, which
computes means over the valid tokens of one sequence or document. The loss therefore does not depend on how a batch is
split into micro-batches. The objective weights each sequence or document by its number of tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fira.nn.moe.router import Routed
from fira.nn.moe.token_means import TokenMeans

Outputs = Callable[[], Tensor]
AuxLoss = Callable[[Routed, Outputs, TokenMeans], Tensor]


def even_weights(routed: Routed, outputs: Outputs, means: TokenMeans) -> Tensor:
    """Σ_e (mean_t p_e − 1/E)²; p_e is a token's weight for expert e, zero if it is not chosen."""
    return (means.by_expert(routed, routed.weights) - 1 / routed.logits.shape[-1]).square().sum(-1)


def load_balance(routed: Routed, outputs: Outputs, means: TokenMeans) -> Tensor:
    """E · Σ_e f_e P_e (Fedus et al. 2021, arXiv 2101.03961): f_e assignments per token, P_e mean probability.

    The minimum is k. transformers' `load_balancing_loss_func` averages f and P over all layers and the whole batch, so
    that imbalances of different layers can cancel, and the loss needs the last stage. Here each layer and sequence has
    its own loss; with one layer and one sequence the two are equal.
    """
    assigned = means.by_expert(routed, torch.ones_like(routed.weights))
    return routed.logits.shape[-1] * (assigned * means(routed.logits.softmax(dim=-1))).sum(-1)


def router_z(routed: Routed, outputs: Outputs, means: TokenMeans) -> Tensor:
    """Router z-loss, mean_t (log Σ_e exp logit_e)², which limits the logits (Zoph et al. 2022, arXiv 2202.08906)."""
    return means(routed.logits.logsumexp(dim=-1, keepdim=True).square()).squeeze(-1)


def small_outputs(routed: Routed, outputs: Outputs, means: TokenMeans) -> Tensor:
    """Mean over experts and channels of (mean_t output)²; the output of an expert that is not chosen is zero."""
    return means.by_expert(routed, outputs()).square().mean((-2, -1))
