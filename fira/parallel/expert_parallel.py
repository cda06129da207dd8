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

With `by_source`, [4] is omitted: the experts compute the rows of each sending rank separately, in products of the same
shapes as with all experts on one rank. Outputs and gradients are then bitwise those of one rank. The experts' weights
have R versions, [R, E/R, …], to which autograd gives separate gradients.

With two parts, [3] to [5] are done for the first half of each rank's experts and for the second half, and [1] sorts by
half before expert. The all-to-all of one half overlaps with the products of the other:

    compute                experts 0     experts 1                      the backward has the same order, from
    link       [3] 0  [3] 1        [5] 0          [5] 1                 the exchange of the outputs' gradients on
"""

from dataclasses import dataclass
from itertools import chain, pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fira.nn.moe.dispatcher import DispatchPlan, RunExperts, TokenDispatcher
from fira.nn.moe.grouped_linear import RowGroups
from fira.nn.moe.permutation import count_by_expert, gather_rows, sort_by_expert
from pipeline.all_to_all import AllToAll


@dataclass(frozen=True)
class Part:
    """How to exchange the assignments to some of each rank's experts. n: those that this rank receives."""

    send: list[int]  # [R] rows to each rank
    receive: list[int]  # [R] rows from each rank
    regroup: tuple[Tensor, Tensor] | None  # [n] sorts received rows by expert, and its inverse; None: by source
    groups: RowGroups  # numbers of rows of the experts on this rank; zero for those of other parts


@dataclass(frozen=True)
class ExchangePlan(DispatchPlan):
    """How to exchange the assignments of one call. `order` sorts them by part, then by expert and thereby by rank."""

    parts: list[Part]


class AllToAllDispatcher(TokenDispatcher):
    """Dispatcher for experts on R ranks: rank e // (E/R) of the group has expert e. All methods are collective.

    parts: number of parts of each rank's experts that are exchanged one after another, at most one per expert.
    by_source: give the experts the rows in R · E/R groups, by sending rank and then by expert. It excludes parts.
    """

    def __init__(self, group: dist.ProcessGroup, parts: int = 1, by_source: bool = False) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.parts = parts
        self.by_source = by_source

    def plan(self, experts: Tensor, num_experts: int, dropped: bool = False) -> ExchangePlan:
        """experts: [N, k] chosen experts; the value `num_experts` marks a dropped assignment.

        This method contains the only host synchronisation of the layer.
        """
        flat, local = experts.flatten(), num_experts // self.ranks
        parts = min(self.parts, local)
        key = flat
        if parts > 1:  # dropped assignments remain the last ones
            key = flat + num_experts * (flat % local * parts // local).where(flat < num_experts, parts)
        order, inverse = sort_by_expert(key)  # [1]
        outgoing = count_by_expert(flat, num_experts + 1)[:num_experts].view(self.ranks, local)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)  # [2]
        sizes = torch.stack([outgoing, incoming]).tolist()
        if self.by_source:
            groups = RowGroups(incoming.flatten(), dict(enumerate(chain(*sizes[1]))))
            send, receive = ([sum(row) for row in rows] for rows in sizes)
            return ExchangePlan(order, inverse, groups, [Part(send, receive, None, groups)])
        groups = RowGroups(incoming.sum(0), dict(enumerate(map(sum, zip(*sizes[1], strict=True)))))
        bounds = [-(-part * local // parts) for part in range(parts + 1)]
        spans = [range(*pair) for pair in pairwise(bounds)]
        return ExchangePlan(order, inverse, groups, [_part(sizes, incoming, groups, span) for span in spans])

    def run(self, tokens: Tensor, keys: Tensor | None, plan: DispatchPlan, top_k: int, experts: RunExperts) -> Tensor:
        """See TokenDispatcher. The operations are started in the order of the diagram at the top of this file."""
        assert isinstance(plan, ExchangePlan)
        tokens_by_part = _by_part(gather_rows(tokens, plan.order, plan.inverse, top_k), plan)
        keys_by_part = _by_part(gather_rows(keys, plan.order, plan.inverse), plan) if keys is not None else []
        exchanges = []
        for number, part in enumerate(plan.parts):  # [3]
            inputs = [tokens_by_part[number], *keys_by_part[number : number + 1]]
            exchanges.append([self._start(x, part.send, part.receive) for x in inputs])
        returning = []
        for part, started in zip(plan.parts, exchanges, strict=True):
            rows, *part_keys = (exchange.wait(x) for exchange, x in started)
            if part.regroup:
                regroup, ungroup = part.regroup
                rows, *part_keys = (gather_rows(x, regroup, ungroup) for x in (rows, *part_keys))  # [4]
            rows = experts(rows, part.groups, part_keys[0] if part_keys else None)
            if part.regroup:
                rows = gather_rows(rows, ungroup, regroup)
            returning.append(self._start(rows, part.receive, part.send))  # [5]
        outputs = [exchange.wait(y) for exchange, y in returning]
        return _resize(outputs[0] if len(outputs) == 1 else torch.cat(outputs), len(plan.order))

    def _start(self, x: Tensor, send: list[int], receive: list[int]) -> tuple[AllToAll, Tensor]:
        exchange = AllToAll(send, receive, self.group)
        return exchange, exchange.start(x)


def _part(sizes: list[list[list[int]]], incoming: Tensor, groups: RowGroups, span: range) -> Part:
    """The exchange for the experts `span` of every rank. sizes: rows sent and received, by rank and expert."""
    send, receive = ([sum(row[span.start : span.stop]) for row in rows] for rows in sizes)
    counts = groups.counts
    assert counts is not None
    if len(span) < len(counts):
        columns = counts[span.start : span.stop]
        padded = F.pad(columns, (span.start, len(counts) - span.stop))
        groups = RowGroups(padded, {expert: groups.sizes[expert] for expert in span})
    received = torch.arange(len(span), device=incoming.device).repeat(len(incoming))  # expert of each count
    columns = incoming[:, span.start : span.stop].flatten()
    received = received.repeat_interleave(columns, output_size=sum(receive))  # expert of each row
    return Part(send, receive, sort_by_expert(received), groups)


def _by_part(rows: Tensor, plan: ExchangePlan) -> list[Tensor]:
    """Split rows in `plan.order` by part, without those of dropped assignments, which come last."""
    counts = [sum(part.send) for part in plan.parts]
    rows = _resize(rows, sum(counts))
    return [rows] if len(counts) == 1 else list(rows.split(counts))


def _resize(rows: Tensor, count: int) -> Tensor:
    """Truncate rows to `count`, or append rows of zeros. In `order`, dropped assignments come last."""
    return rows if len(rows) == count else F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, count - len(rows)))
