"""Expert parallelism: send tokens to experts on other ranks and back by all-to-all with uneven sizes.

Shapes: N tokens on this rank, k experts per token, N·k assignments (token-major), E experts, R ranks in the group,
E/R experts per rank, n assignments of all ranks to this rank's experts. No assignment is dropped by the exchange.

    this rank's assignments  [N·k]
      [1] sort by expert                → send[r] rows for the experts of rank r
      [2] exchange counts  [R, E/R]     → receive[r] rows from rank r
      [3] all-to-all  send → receive    → [n], sorted by sending rank, then by expert
      [4] regroup                       → [n], sorted by expert
          experts
      [5] ungroup, all-to-all  receive → send
    outputs  [N·k], sorted by expert as after [1]
"""

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
    """How to exchange the assignments of one call. `order` sorts them by expert and thereby by rank."""

    send: list[int]  # [R] rows to each rank
    receive: list[int]  # [R] rows from each rank
    regroup: Tensor  # [n] sorts received rows by expert
    ungroup: Tensor  # [n] its inverse


class AllToAllDispatcher(TokenDispatcher):
    """Dispatcher for experts on R ranks: rank e // (E/R) of the group has expert e. All methods are collective."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)

    def plan(self, experts: Tensor, num_experts: int, dropped: bool = False) -> ExchangePlan:
        """experts: [N, k] chosen experts; the value `num_experts` marks a dropped assignment.

        This method contains the only host synchronisation of the layer.
        """
        flat = experts.flatten()
        order, inverse = sort_by_expert(flat)  # [1]
        outgoing = count_by_expert(flat, num_experts + 1)[:num_experts].view(self.ranks, -1)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)  # [2]
        sizes = torch.stack([outgoing, incoming]).tolist()
        received = torch.arange(incoming.shape[1], device=flat.device).repeat(self.ranks)  # local expert of each row
        received = received.repeat_interleave(incoming.flatten(), output_size=sum(map(sum, sizes[1])))
        regroup, ungroup = sort_by_expert(received)
        rows_by_expert = dict(enumerate(map(sum, zip(*sizes[1], strict=True))))
        return ExchangePlan(
            order=order,
            inverse=inverse,
            groups=RowGroups(incoming.sum(0), rows_by_expert),
            send=[sum(row) for row in sizes[0]],
            receive=[sum(row) for row in sizes[1]],
            regroup=regroup,
            ungroup=ungroup,
        )

    def dispatch(self, rows: Tensor, plan: DispatchPlan, copies: int = 1) -> Tensor:
        """rows [N·k / copies, …] of this rank's tokens → [n, …] for this rank's experts, sorted by expert."""
        assert isinstance(plan, ExchangePlan)
        rows = _resize(gather_rows(rows, plan.order, plan.inverse, copies), sum(plan.send))
        rows = all_to_all(rows, plan.send, plan.receive, self.group)  # [3]
        return gather_rows(rows, plan.regroup, plan.ungroup)  # [4]

    def combine(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """[n, …] sorted by expert → [N·k, …] for this rank's tokens in `plan.order`; zero for dropped assignments."""
        assert isinstance(plan, ExchangePlan)
        rows = gather_rows(rows, plan.ungroup, plan.regroup)
        return _resize(all_to_all(rows, plan.receive, plan.send, self.group), len(plan.order))  # [5]


def _resize(rows: Tensor, count: int) -> Tensor:
    """Truncate rows to `count`, or append rows of zeros. In `order`, dropped assignments come last."""
    return rows if len(rows) == count else F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, count - len(rows)))
