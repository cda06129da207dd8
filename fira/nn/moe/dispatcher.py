"""Dispatch of tokens to experts on the same rank, and combination of the experts' outputs.

Shapes: N tokens, k experts per token, n rows for the experts of this rank (here N·k).

    rows of tokens [N, d] ── dispatch ─→ [n, d], sorted by expert ── experts ─→ [n, h] ── combine ─→ [N·k, h]

`fira.parallel.expert_parallel` has the dispatcher with the same two methods for experts on several ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fira.nn.moe.grouped_linear import RowGroups
from fira.nn.moe.permutation import count_by_expert, gather_rows, sort_by_expert

# Rows [n, d] sorted by expert, the numbers of rows of each expert, keys [n] for dropout → outputs [n, h]
RunExperts = Callable[[Tensor, RowGroups, Tensor | None], Tensor]


@dataclass(frozen=True)
class DispatchPlan:
    """Permutation of the N·k assignments: `order` sorts them by expert, `inverse` restores the order of the tokens."""

    order: Tensor
    inverse: Tensor
    groups: RowGroups  # numbers of rows of the experts on this rank


class TokenDispatcher:
    """Moves the rows of tokens to their experts, and the outputs back. All experts are on this rank."""

    def plan(self, experts: Tensor, num_experts: int, dropped: bool = False) -> DispatchPlan:
        """Plan of experts [N, k]. dropped: some entries may be `num_experts`, which means no expert."""
        flat = experts.flatten()
        if len(experts) == 1 and not (dropped or flat.device.type != "cpu"):  # one token: nothing to sort
            order = torch.arange(len(flat))
            return DispatchPlan(order, order, RowGroups(None, dict.fromkeys(flat.tolist(), 1)))
        counts = count_by_expert(flat, num_experts + 1)[:num_experts]
        return DispatchPlan(*sort_by_expert(flat), RowGroups(counts, ragged=dropped))

    def run(self, tokens: Tensor, keys: Tensor | None, plan: DispatchPlan, top_k: int, experts: RunExperts) -> Tensor:
        """Dispatch tokens [N, d] and keys [N·k], run the experts, and combine their outputs.

        Returns [N·k, h] in `plan.order`; the rows of assignments to no expert are zero.
        """
        if keys is not None:
            keys = gather_rows(keys, plan.order, plan.inverse)
        return experts(gather_rows(tokens, plan.order, plan.inverse, top_k), plan.groups, keys)
