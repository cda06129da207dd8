"""Mixture-of-Experts layer: router → dispatch → experts → combine (Shazeer et al. 2017), dropless as in MegaBlocks.

Shapes: B sequences of T tokens, N = B·T, d model width, E experts, k experts per token, h the experts' output width.

    x        [B, T, d]  input
    experts  [N, k]     chosen experts; the number E stands for an assignment that exceeds the capacity
    weights  [N, k]     weights of their outputs
    rows     [n, d]     rows of the experts on this rank, sorted by expert; n = N·k if all experts are on this rank
    outputs  [N·k, h]   expert outputs for this rank's tokens, in the plan's order
    y        [B, T, h]  output

The dispatcher here keeps tokens on their rank. `parallelize` replaces it by one with the same methods that exchanges
tokens with other ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fira.nn.autocast import product_dtype
from fira.nn.context import Context, MoEStats
from fira.nn.moe.aux_losses import AuxLoss
from fira.nn.moe.capacity import within_capacity
from fira.nn.moe.dispatcher import DispatchPlan, TokenDispatcher
from fira.nn.moe.experts import ExpertBank
from fira.nn.moe.permutation import count_by_expert, gather_rows, weighted_sum
from fira.nn.moe.router import Routed, Router
from fira.nn.moe.token_means import TokenMeans


class _AddToObjective(torch.autograd.Function):
    """Identity in x whose backward gives `loss` a gradient of one, as if it had been added to the training loss.

    The auxiliary loss is thus trained in its own layer and is not sent to the last pipeline stage.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


class MoE(nn.Module):
    """y = Σ_e p_e · norm(expert_e(x)) over the chosen experts.

    index: the layer's index in the model, the key of its statistics. losses: auxiliary losses with their coefficients.
    norm: applied to each expert's output before it is weighted.
    capacity_factor: in training an expert accepts at most this multiple of its equal share of a sequence or document;
    the output of assignments beyond that is zero. 0: no limit.
    """

    def __init__(
        self,
        router: Router,
        experts: ExpertBank,
        num_experts: int,
        index: int,
        losses: Sequence[tuple[AuxLoss, float]],
        norm: nn.Module | None = None,
        capacity_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self._random = experts.random  # not read in the forward pass, where PEFT may have wrapped the experts
        self.norm = norm or nn.Identity()
        self.dispatcher = TokenDispatcher()
        self.num_experts = num_experts
        self.index = index
        self.losses = [(loss, coefficient) for loss, coefficient in losses if coefficient]
        self.capacity_factor = capacity_factor

    def forward(self, x: Tensor, context: Context, keys: Tensor | None) -> Tensor:
        """x [B, T, d], keys [B, T] int32 for dropout inside the experts and for routing noise → [B, T, h]."""
        tokens, flat_keys = x.flatten(0, 1), None if keys is None else keys.flatten()
        # 1. Router: choose k experts per token, and drop assignments beyond the capacity.
        routed = self.router(tokens, flat_keys)
        experts, accepted = routed.experts, None
        if self.capacity_factor and self.training and context.training.aux_weights is not None:
            chosen = experts.unflatten(0, x.shape[:2])
            accepted = within_capacity(
                chosen, context.valid(x), self.num_experts, self.capacity_factor, context.documents
            )
            experts = experts.where(accepted.flatten(0, 1), self.num_experts)
        # 2. Plan: the order of the assignments by expert, and how many rows each expert gets.
        plan = self.dispatcher.plan(experts, self.num_experts, dropped=accepted is not None)
        if not self._random:
            flat_keys = None
        elif flat_keys is not None:  # the dropout mask of a token differs between its experts
            flat_keys = (flat_keys[:, None] + experts.to(torch.int32)).flatten()
        # 3. Dispatch the rows to the experts, run these, and bring their outputs back. The experts' first product would
        # cast the rows; casting them here halves what the ranks exchange.
        tokens = tokens.to(product_dtype(tokens))
        outputs = self.norm(self.dispatcher.run(tokens, flat_keys, plan, experts.shape[1], self.experts))
        # 4. Combine: add the outputs of each token by their weights.
        y = weighted_sum(outputs, routed.weights, plan.order, plan.inverse).view(*x.shape[:2], -1)
        if context.training.aux_weights is None:
            return y
        # 5. Training: auxiliary losses and statistics.
        return self._add_losses(y, routed, outputs, plan, accepted, context)

    def _add_losses(
        self, y: Tensor, flat: Routed, rows: Tensor, plan: DispatchPlan, accepted: Tensor | None, context: Context
    ) -> Tensor:
        """Store the statistics in the context; return y, whose backward also trains the auxiliary losses."""
        training = context.training
        assert training.aux_weights is not None
        routed, valid = Routed(*(part.unflatten(0, y.shape[:2]) for part in flat)), context.valid(y)

        def outputs() -> Tensor:
            return gather_rows(rows, plan.inverse, plan.order).unflatten(0, routed.experts.shape)

        means = TokenMeans(valid, context.documents, training.aux_weights.shape[-1])
        aux = y.new_zeros((), dtype=routed.logits.dtype)
        for loss, coefficient in self.losses:
            aux = aux + coefficient * (loss(routed, outputs, means) * training.aux_weights).sum()
        assigned = valid[..., None].expand_as(routed.experts)
        load = self._count(routed.experts, assigned)
        dropped = torch.zeros_like(load) if accepted is None else self._count(routed.experts, assigned & ~accepted)
        entropy = (torch.special.entr(routed.logits.detach().softmax(dim=-1)) * valid[..., None]).sum()
        stats = MoEStats(load, dropped, entropy, aux if training.caller_adds_aux else aux.detach())
        training.stats[self.index, context.chunk] = stats
        return y if training.caller_adds_aux else _AddToObjective.apply(y, aux)

    def _count(self, experts: Tensor, mask: Tensor) -> Tensor:
        """experts, mask [B, T, k] → [E], the number of assignments to each expert where the mask is true."""
        return count_by_expert(experts.flatten(), self.num_experts, mask.flatten().long())

    def own_flops_per_token(self, length: int) -> float:
        """FLOPs of the chosen experts. The router is a Linear, which `Layer.flops_per_token` counts."""
        return 2.0 * self.router.top_k * self.experts.own_numel()
