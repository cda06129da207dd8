"""Mixture of experts: router → dispatch → experts → combine (Shazeer et al. 2017; dropless as in MegaBlocks, 2022).

Router, dispatcher and experts are siblings that know nothing of one another. The dispatcher here keeps tokens on
their rank; the one that sends them to other ranks has the same three methods and is put in by `fira.parallelize`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .aux_losses import AuxLoss
from .capacity import within_capacity
from .context import Context, MoEStats
from .experts import ExpertBank
from .grouped import Groups
from .router import Routed, Router


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
    groups: Groups  # the rows of each expert that is computed here


def sort_by_expert(experts: Tensor) -> tuple[Tensor, Tensor]:
    """Expert numbers [n] → a stable order that sorts them, and its inverse."""
    order = experts.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return order, inverse


def count_by_expert(experts: Tensor, num_experts: int, weights: Tensor | None = None) -> Tensor:
    """Expert numbers [n] → [E] int64, how often each stands there, or the sum of its weights [n] int64."""
    weights = torch.ones_like(experts) if weights is None else weights
    return weights.new_zeros(num_experts).scatter_add_(0, experts, weights)  # bincount would wait for the device


def gather_rows(x: Tensor, order: Tensor, inverse: Tensor, copies: int = 1) -> Tensor:
    """Rows of x, each standing `copies` times in a row, in the given order. Differentiable in x."""
    return _Gather.apply(x, order, inverse, copies)


class TokenDispatcher:
    """Brings each token's row to its experts, and the results back. All experts are on this rank."""

    def plan(self, experts: Tensor, num_experts: int) -> Plan:
        """experts: [N, k] chosen experts."""
        flat = experts.flatten()
        return Plan(*sort_by_expert(flat), Groups(count_by_expert(flat, num_experts)))

    def dispatch(self, rows: Tensor, plan: Plan, copies: int = 1) -> Tensor:
        """[N·k / copies, …] → [N·k, …] sorted by expert; copies = k sends one row to all k experts of its token."""
        return gather_rows(rows, plan.order, plan.inverse, copies)

    def combine(self, rows: Tensor, plan: Plan) -> Tensor:
        """[N·k, …] sorted by expert → [N·k, …] as the tokens stood."""
        return gather_rows(rows, plan.inverse, plan.order)


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
        flat_keys = None if keys is None else keys.flatten()
        flat = self.router(x.flatten(0, 1), flat_keys)
        routed = Routed(*(part.unflatten(0, x.shape[:2]) for part in flat))
        valid = context.valid(x)
        taken = None
        if self.capacity_factor and self.training and context.aux_weights is not None:
            taken = within_capacity(routed.experts, valid, self.num_experts, self.capacity_factor)
        outputs = self.norm(self._compute(x.flatten(0, 1), flat.experts, taken, flat_keys))
        outputs = outputs.unflatten(0, routed.experts.shape)
        y = (outputs * routed.weights[..., None]).sum(2)
        return y if context.aux_weights is None else self._note(y, routed, outputs, valid, taken, context)

    def _compute(self, tokens: Tensor, experts: Tensor, taken: Tensor | None, keys: Tensor | None) -> Tensor:
        """Outputs [N·k, h] of the chosen experts [N, k] for tokens [N, d]; zero where an assignment is not taken."""
        top_k = experts.shape[1]
        if keys is not None:  # a token has another mask in each of its experts
            keys = (keys[:, None] + experts.to(torch.int32)).flatten()
        if taken is None:
            return self._run(tokens, experts, top_k, keys)
        rows = taken.flatten().nonzero().squeeze(1)
        some = self._run(tokens[rows // top_k], experts.flatten()[rows, None], 1, None if keys is None else keys[rows])
        return some.new_zeros(experts.numel(), some.shape[1]).index_copy(0, rows, some)

    def _run(self, rows: Tensor, experts: Tensor, copies: int, keys: Tensor | None) -> Tensor:
        """Dispatch rows [n, d] to experts [n, copies], keys [n · copies] with them, and bring the outputs back."""
        plan = self.dispatcher.plan(experts, self.num_experts)
        if keys is not None:
            keys = self.dispatcher.dispatch(keys, plan)
        return self.dispatcher.combine(
            self.experts(self.dispatcher.dispatch(rows, plan, copies), plan.groups, keys), plan
        )

    def _note(
        self, y: Tensor, routed: Routed, outputs: Tensor, valid: Tensor, taken: Tensor | None, context: Context
    ) -> Tensor:
        """y, whose backward trains the losses too unless the caller does; the statistics go into the context."""
        assert context.aux_weights is not None
        aux = y.new_zeros((), dtype=routed.logits.dtype)
        for loss, coefficient in self.losses:
            aux = aux + coefficient * (loss(routed, outputs, valid) * context.aux_weights).sum()
        assigned = valid[..., None].expand_as(routed.experts)
        load = self._count(routed.experts, assigned)
        dropped = torch.zeros_like(load) if taken is None else self._count(routed.experts, assigned & ~taken)
        chance = routed.logits.detach().log_softmax(dim=-1)
        entropy = -(chance.exp() * chance * valid[..., None]).sum()
        note = MoEStats(load, dropped, entropy, aux if context.aux_apart else aux.detach())
        context.stats[self.index, context.part] = note
        return y if context.aux_apart else _AddToObjective.apply(y, aux)

    def _count(self, experts: Tensor, counted: Tensor) -> Tensor:
        """experts, counted: [B, T, k] → [E], how many of those counted are each expert's."""
        return count_by_expert(experts.flatten(), self.num_experts, counted.flatten().long())

    def own_flops_per_token(self, length: int) -> float:
        """The chosen experts; the router is a Linear and counts as such."""
        return 2.0 * self.router.top_k * self.experts.own_numel()
