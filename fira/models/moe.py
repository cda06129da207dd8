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


def _sum_rows(rows: Tensor, places: Tensor, copies: int, weights: Tensor | None = None) -> Tensor:
    """Row i is the sum of rows[places[i·copies + j]] over j, each times weights[i·copies + j], in one pass."""
    if copies == 1 and weights is None:
        return rows.index_select(0, places)
    starts = torch.arange(0, len(places), copies, device=places.device)
    return torch.embedding_bag(rows, places, starts, per_sample_weights=weights)[0]


class _Gather(torch.autograd.Function):
    """Rows x[order // copies]. Given the inverse of `order`, the backward reads rows as well, and scatters none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return _sum_rows(grad, inverse, ctx.copies), None, None, None


class _WeightedSum(torch.autograd.Function):
    """Row i is Σ_j weights[i, j] · rows[inverse[i·k + j]]; no weighted row is written down."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order, inverse)
        return _sum_rows(rows, inverse, weights.shape[1], weights.flatten())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, order, inverse = ctx.saved_tensors
        of_rows = grad.index_select(0, order // weights.shape[1])
        of_weights = (of_rows * rows).sum(1)[inverse].view_as(weights)
        return of_rows.mul_(weights.flatten()[order][:, None]), of_weights, None, None


@dataclass(frozen=True)
class Plan:
    """Who goes where: `order` sorts the N·k assignments by expert, `inverse` puts them back."""

    order: Tensor
    inverse: Tensor
    groups: Groups  # the rows of each expert that is computed here


def sort_by_expert(experts: Tensor) -> tuple[Tensor, Tensor]:
    """Expert numbers [n] → a stable order that sorts them, and its inverse."""
    order = experts.argsort(stable=True)
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def count_by_expert(experts: Tensor, num_experts: int, weights: Tensor | None = None) -> Tensor:
    """Expert numbers [n] → [E] int64, how often each stands there, or the sum of its weights [n] int64."""
    weights = torch.ones_like(experts) if weights is None else weights
    return weights.new_zeros(num_experts).scatter_add_(0, experts, weights)  # bincount would wait for the device


def gather_rows(x: Tensor, order: Tensor, inverse: Tensor, copies: int = 1) -> Tensor:
    """Rows of x, each standing `copies` times in a row, in the given order. Differentiable in x."""
    if len(x) == 1:
        return x.expand(copies, *x.shape[1:])
    if not torch.is_grad_enabled():
        return x.index_select(0, order // copies if copies > 1 else order)
    return _Gather.apply(x, order, inverse, copies)


def weighted_sum(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """rows [N·k, h] sorted by expert, weights [N, k] of each token's → [N, h]. Differentiable in both."""
    dtype = torch.promote_types(rows.dtype, weights.dtype)
    if not torch.is_grad_enabled():
        return _sum_rows(rows.to(dtype), plan.inverse, weights.shape[1], weights.to(dtype).flatten())
    return _WeightedSum.apply(rows.to(dtype), weights.to(dtype), plan.order, plan.inverse)


class TokenDispatcher:
    """Brings each token's row to its experts, and the results back. All experts are on this rank."""

    def plan(self, experts: Tensor, num_experts: int, dropped: bool = False) -> Plan:
        """experts: [N, k] chosen experts. dropped: some may be `num_experts`, which stands for none of them."""
        flat = experts.flatten()
        if len(experts) == 1 and not (dropped or flat.is_cuda):  # of one token nothing has to be sorted
            order = torch.arange(len(flat))
            return Plan(order, order, Groups(None, dict.fromkeys(flat.tolist(), 1)))
        counts = count_by_expert(flat, num_experts + 1)[:num_experts]
        return Plan(*sort_by_expert(flat), Groups(counts, ragged=dropped))

    def dispatch(self, rows: Tensor, plan: Plan, copies: int = 1) -> Tensor:
        """[N·k / copies, …] → [n, …] for the experts here; copies = k sends one row to all k experts of its token."""
        return gather_rows(rows, plan.order, plan.inverse, copies)

    def collect(self, rows: Tensor, plan: Plan) -> Tensor:
        """[n, …] from the experts here → [N·k, …] from all experts, in `plan.order`; zero where it was none."""
        return rows


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
        if self.capacity_factor and self.training and context.aux_weights is not None:
            chosen = experts.unflatten(0, x.shape[:2])
            taken = within_capacity(chosen, context.valid(x), self.num_experts, self.capacity_factor)
            experts = experts.where(taken.flatten(0, 1), self.num_experts)
        plan = self.dispatcher.plan(experts, self.num_experts, dropped=taken is not None)
        if flat_keys is not None:  # a token has another mask in each of its experts
            flat_keys = self.dispatcher.dispatch((flat_keys[:, None] + experts.to(torch.int32)).flatten(), plan)
        rows = self.dispatcher.dispatch(tokens, plan, experts.shape[1])
        rows = self.norm(self.dispatcher.collect(self.experts(rows, plan.groups, flat_keys), plan))
        y = weighted_sum(rows, routed.weights, plan).view(*x.shape[:2], -1)
        return y if context.aux_weights is None else self._note(y, routed, rows, plan, taken, context)

    def _note(
        self, y: Tensor, flat: Routed, rows: Tensor, plan: Plan, taken: Tensor | None, context: Context
    ) -> Tensor:
        """y, whose backward trains the losses too unless the caller does; the statistics go into the context."""
        assert context.aux_weights is not None
        routed, valid = Routed(*(part.unflatten(0, y.shape[:2]) for part in flat)), context.valid(y)

        def outputs() -> Tensor:
            return gather_rows(rows, plan.inverse, plan.order).unflatten(0, routed.experts.shape)

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
