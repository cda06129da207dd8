"""Tokens travel to experts on other ranks and back: all-to-all with uneven sizes, and no token dropped."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fira.nn.moe.dispatcher import DispatchPlan, TokenDispatcher
from fira.nn.moe.grouped_linear import RowGroups
from fira.nn.moe.permutation import count_by_expert, gather_rows, sort_by_expert
from pipeline.all_to_all import all_to_all


@dataclass(frozen=True)
class ExchangePlan(DispatchPlan):
    """`order` sorts this rank's assignments by expert, hence by rank; `regroup` sorts what arrives by local expert."""

    send: list[int]
    receive: list[int]
    regroup: Tensor
    ungroup: Tensor


class AllToAllDispatcher(TokenDispatcher):
    """Expert e is on rank e // (experts / ranks) of the group. Every rank of the group must call each method."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)

    def plan(self, experts: Tensor, num_experts: int, dropped: bool = False) -> ExchangePlan:
        """experts: [N, k] chosen experts; `num_experts` for one that is sent to none.

        Exchanges the counts; the one host synchronisation of the layer is here.
        """
        flat = experts.flatten()
        order, inverse = sort_by_expert(flat)
        outgoing = count_by_expert(flat, num_experts + 1)[:num_experts].view(self.ranks, -1)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)
        sizes = torch.stack([outgoing, incoming]).tolist()
        arriving = torch.arange(incoming.shape[1], device=flat.device).repeat(self.ranks)
        arriving = arriving.repeat_interleave(incoming.flatten(), output_size=sum(map(sum, sizes[1])))
        return ExchangePlan(
            order,
            inverse,
            RowGroups(incoming.sum(0), dict(enumerate(map(sum, zip(*sizes[1], strict=True))))),
            [sum(row) for row in sizes[0]],
            [sum(row) for row in sizes[1]],
            *sort_by_expert(arriving),
        )

    def dispatch(self, rows: Tensor, plan: DispatchPlan, copies: int = 1) -> Tensor:
        """[N·k / copies, …] here → [n, …], the rows for this rank's experts, sorted by expert."""
        assert isinstance(plan, ExchangePlan)
        rows = _first(gather_rows(rows, plan.order, plan.inverse, copies), sum(plan.send))
        return gather_rows(all_to_all(rows, plan.send, plan.receive, self.group), plan.regroup, plan.ungroup)

    def combine(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """[n, …] sorted by local expert → [N·k, …] of this rank's tokens in `plan.order`, zero where it was none."""
        assert isinstance(plan, ExchangePlan)
        rows = all_to_all(gather_rows(rows, plan.ungroup, plan.regroup), plan.receive, plan.send, self.group)
        return _first(rows, len(plan.order))


def _first(rows: Tensor, count: int) -> Tensor:
    """The first `count` rows, with zeros behind them where there are not as many."""
    return rows if len(rows) == count else F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, count - len(rows)))
