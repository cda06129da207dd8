"""Dispatch of tokens to experts on the same rank.

`fira.parallel.expert_parallel` has the dispatcher for experts on several ranks; it has the same three methods.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fira.nn.moe.grouped_linear import RowGroups
from fira.nn.moe.permutation import count_by_expert, gather_rows, sort_by_expert


@dataclass(frozen=True)
class DispatchPlan:
    """Who goes where: `order` sorts the N·k assignments by expert, `inverse` puts them back."""

    order: Tensor
    inverse: Tensor
    groups: RowGroups  # the rows of each expert that is computed here


class TokenDispatcher:
    """Brings each token's row to its experts, and the results back. All experts are on this rank."""

    def plan(self, experts: Tensor, num_experts: int, dropped: bool = False) -> DispatchPlan:
        """experts: [N, k] chosen experts. dropped: some may be `num_experts`, which stands for none of them."""
        flat = experts.flatten()
        if len(experts) == 1 and not (dropped or flat.is_cuda):  # of one token nothing has to be sorted
            order = torch.arange(len(flat))
            return DispatchPlan(order, order, RowGroups(None, dict.fromkeys(flat.tolist(), 1)))
        counts = count_by_expert(flat, num_experts + 1)[:num_experts]
        return DispatchPlan(*sort_by_expert(flat), RowGroups(counts, ragged=dropped))

    def dispatch(self, rows: Tensor, plan: DispatchPlan, copies: int = 1) -> Tensor:
        """[N·k / copies, …] → [n, …] for the experts here; copies = k sends one row to all k experts of its token."""
        return gather_rows(rows, plan.order, plan.inverse, copies)

    def combine(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """[n, …] from the experts here → [N·k, …] from all experts, in `plan.order`; zero where it was none."""
        return rows
