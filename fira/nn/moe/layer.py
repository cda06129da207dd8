"""Mixture of experts: router → dispatch → experts → combine (Shazeer et al. 2017; dropless as in MegaBlocks, 2022).

Router, dispatcher and experts are siblings that know nothing of one another. The dispatcher here keeps tokens on
their rank; the one that sends them to other ranks has the same three methods and is put in by `parallelize`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fira.nn.context import Context, MoEStats
from fira.nn.moe.aux_losses import AuxLoss
from fira.nn.moe.capacity import within_capacity
from fira.nn.moe.dispatcher import DispatchPlan, TokenDispatcher
from fira.nn.moe.experts import ExpertBank
from fira.nn.moe.permutation import count_by_expert, gather_rows, weighted_sum
from fira.nn.moe.router import Routed, Router


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


class MoE(nn.Module):
    """y = Σ_e p_e · norm(expert_e(x)) over the chosen experts; adds its losses to the objective and notes the load.

    index: the layer's number, under which its statistics are found. losses: each with its coefficient.
    norm: of each chosen expert's output, before it is weighted.
    capacity_factor: how many times its even share of a sequence an expert takes at most while training; what is more
    has an output of zero. 0: every expert takes all that come.
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
        self.norm = norm or nn.Identity()
        self.dispatcher = TokenDispatcher()
        self.num_experts = num_experts
        self.index = index
        self.losses = [(loss, coefficient) for loss, coefficient in losses if coefficient]
        self.capacity_factor = capacity_factor

    def forward(self, x: Tensor, context: Context, keys: Tensor | None) -> Tensor:
        """x: [B, T, d], keys: [B, T] int32 for dropout inside the experts and for noise → [B, T, width of experts]."""
        tokens, flat_keys = x.flatten(0, 1), None if keys is None else keys.flatten()
        routed = self.router(tokens, flat_keys)
        experts, taken = routed.experts, None
        if self.capacity_factor and self.training and context.training.aux_weights is not None:
            chosen = experts.unflatten(0, x.shape[:2])
            taken = within_capacity(chosen, context.valid(x), self.num_experts, self.capacity_factor)
            experts = experts.where(taken.flatten(0, 1), self.num_experts)
        plan = self.dispatcher.plan(experts, self.num_experts, dropped=taken is not None)
        if flat_keys is not None:  # a token has another mask in each of its experts
            flat_keys = self.dispatcher.dispatch((flat_keys[:, None] + experts.to(torch.int32)).flatten(), plan)
        rows = self.dispatcher.dispatch(tokens, plan, experts.shape[1])
        rows = self.norm(self.dispatcher.combine(self.experts(rows, plan.groups, flat_keys), plan))
        y = weighted_sum(rows, routed.weights, plan.order, plan.inverse).view(*x.shape[:2], -1)
        return y if context.training.aux_weights is None else self._note(y, routed, rows, plan, taken, context)

    def _note(
        self, y: Tensor, flat: Routed, rows: Tensor, plan: DispatchPlan, taken: Tensor | None, context: Context
    ) -> Tensor:
        """y, whose backward trains the losses too unless the caller does; the statistics go into the context."""
        training = context.training
        assert training.aux_weights is not None
        routed, valid = Routed(*(part.unflatten(0, y.shape[:2]) for part in flat)), context.valid(y)

        def outputs() -> Tensor:
            return gather_rows(rows, plan.inverse, plan.order).unflatten(0, routed.experts.shape)

        aux = y.new_zeros((), dtype=routed.logits.dtype)
        for loss, coefficient in self.losses:
            aux = aux + coefficient * (loss(routed, outputs, valid) * training.aux_weights).sum()
        assigned = valid[..., None].expand_as(routed.experts)
        load = self._count(routed.experts, assigned)
        dropped = torch.zeros_like(load) if taken is None else self._count(routed.experts, assigned & ~taken)
        chance = routed.logits.detach().log_softmax(dim=-1)
        entropy = -(chance.exp() * chance * valid[..., None]).sum()
        note = MoEStats(load, dropped, entropy, aux if training.caller_adds_aux else aux.detach())
        training.stats[self.index, context.chunk] = note
        return y if training.caller_adds_aux else _AddToObjective.apply(y, aux)

    def _count(self, experts: Tensor, counted: Tensor) -> Tensor:
        """experts, counted: [B, T, k] → [E], how many of those counted are each expert's."""
        return count_by_expert(experts.flatten(), self.num_experts, counted.flatten().long())

    def own_flops_per_token(self, length: int) -> float:
        """The chosen experts; the router is a Linear and counts as such."""
        return 2.0 * self.router.top_k * self.experts.own_numel()
