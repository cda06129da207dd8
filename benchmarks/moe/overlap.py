"""Would it pay to send the rows of one half of the experts while the other half computes?

    mpirun -np 2 python -m benchmarks.moe.overlap

Experts are spread over pairs of ranks. `together` is the dispatcher's way: all rows travel, all experts compute, all
rows travel back. `overlapped` has two halves of each rank's experts: both halves' rows set out at once, the first half
computes while the second may travel, and goes back while the second computes. The products are the same, and so is
every bit. `travel` is the exchanges alone: no overlap can save more. Forward only; a backward has the same exchanges
beside twice the products.
"""

import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import pipeline
from benchmarks.measure import alternate, ratio
from fira.nn.moe.experts import GatedExperts
from fira.nn.moe.grouped_linear import RowGroups
from fira.parallel.expert_parallel import AllToAllDispatcher

ROUNDS = 15
TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K, EP = 2048, 384, 768, 8, 2, 2
LOCAL = EXPERTS // EP


class Chunk:
    """Some of every rank's experts: which rows go to them, in the order of rank and expert."""

    def __init__(self, chosen: Tensor, places: list[int], group: dist.ProcessGroup) -> None:
        mine = [[rank * LOCAL + place for place in places] for rank in range(EP)]
        self.rows = torch.cat([(chosen.flatten() == e).nonzero()[:, 0] for rank in mine for e in rank])
        outgoing = torch.tensor([[int((chosen == e).sum()) for e in rank] for rank in mine])
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=group)
        self.send, self.receive = outgoing.sum(1).tolist(), incoming.sum(1).tolist()
        arriving = torch.arange(len(places)).repeat(EP).repeat_interleave(incoming.flatten())
        self.regroup = arriving.argsort(stable=True)
        self.groups = RowGroups(None, dict(zip(places, incoming.sum(0).tolist(), strict=True)))
        self.group = group

    def start(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """The rows set out: where they will be, and what to wait for."""
        there = x.new_empty(sum(self.receive), x.shape[1])
        rows = x[self.rows // TOP_K]
        return there, dist.all_to_all_single(there, rows, self.receive, self.send, self.group, async_op=True)

    def compute(self, there: Tensor, experts: GatedExperts) -> Tensor:
        y = torch.empty_like(there)
        y[self.regroup] = experts(there[self.regroup], self.groups, None)
        return y

    def back(self, y: Tensor) -> tuple[Tensor, dist.Work]:
        home = y.new_empty(len(self.rows), y.shape[1])
        return home, dist.all_to_all_single(home, y, self.send, self.receive, self.group, async_op=True)


def overlapped(x: Tensor, chunks: list[Chunk], experts: GatedExperts) -> Tensor:
    under_way = [chunk.start(x) for chunk in chunks]
    returning = []
    for chunk, (there, work) in zip(chunks, under_way, strict=True):
        work.wait()
        returning.append(chunk.back(chunk.compute(there, experts)))
    y = x.new_empty(len(x) * TOP_K, x.shape[1])
    for chunk, (home, work) in zip(chunks, returning, strict=True):
        work.wait()
        y[chunk.rows] = home
    return y


@torch.inference_mode()
def main() -> None:
    pipeline.init()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    groups = [dist.new_group(list(range(first, first + EP))) for first in range(0, ranks, EP)]
    group = groups[rank // EP]
    torch.manual_seed(rank)
    experts = GatedExperts(LOCAL, WIDTH, HIDDEN, F.silu)
    for parameter in experts.parameters():
        parameter.normal_(std=0.02)
    x, chosen = torch.randn(TOKENS, WIDTH), torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices
    dispatcher = AllToAllDispatcher(group)
    plan = dispatcher.plan(chosen, EXPERTS)
    places = list(range(LOCAL))
    chunks = [Chunk(chosen, half, group) for half in (places[: LOCAL // 2], places[LOCAL // 2 :])]

    def together(compute: Callable[[Tensor], Tensor]) -> Tensor:
        return dispatcher.combine(compute(dispatcher.dispatch(x, plan, TOP_K)), plan)[plan.inverse]

    calls = {
        "together": lambda: together(lambda rows: experts(rows, plan.groups, None)),
        "overlapped": lambda: overlapped(x, chunks, experts),
        "travel": lambda: together(lambda rows: rows),
    }
    same = torch.equal(calls["together"](), calls["overlapped"]())
    seconds = alternate({name: lambda call=call: (call(), dist.barrier()) for name, call in calls.items()}, ROUNDS)
    if rank == 0:
        print(
            f"{ranks} ranks, same bits: {same}; ms:",
            {name: round(1e3 * statistics.median(v), 1) for name, v in seconds.items()},
            f"together / overlapped {ratio(seconds['together'], seconds['overlapped']):.3f}",
        )


if __name__ == "__main__":
    main()
