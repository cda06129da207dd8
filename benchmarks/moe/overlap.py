"""Benchmark of expert parallelism: overlap of the all-to-all exchanges with the experts' products.

    mpirun -np 2 python -m benchmarks.moe.overlap

The experts are spread over pairs of ranks. `sequential` is the dispatcher's order: dispatch all rows, compute all
experts, combine all rows. `overlapped` divides each rank's experts into two halves: both dispatches start at the same
time, the first half is computed during the second dispatch, and its combine runs while the second half is computed.
The results are bitwise identical. `exchanges` is dispatch and combine alone, the upper limit of what overlap can save.
Only the forward pass is measured; the backward pass has the same exchanges and twice the products.
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
    """The same subset of experts on every rank, and the assignments to them in the order of rank and expert."""

    def __init__(self, chosen: Tensor, local_experts: list[int], group: dist.ProcessGroup) -> None:
        experts_by_rank = [[rank * LOCAL + expert for expert in local_experts] for rank in range(EP)]
        self.rows = torch.cat([(chosen.flatten() == e).nonzero()[:, 0] for rank in experts_by_rank for e in rank])
        outgoing = torch.tensor([[int((chosen == e).sum()) for e in rank] for rank in experts_by_rank])
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=group)
        self.send, self.receive = outgoing.sum(1).tolist(), incoming.sum(1).tolist()
        arriving = torch.arange(len(local_experts)).repeat(EP).repeat_interleave(incoming.flatten())
        self.regroup = arriving.argsort(stable=True)
        self.groups = RowGroups(None, dict(zip(local_experts, incoming.sum(0).tolist(), strict=True)))
        self.group = group

    def dispatch(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """Start the dispatch; return the received rows and the work to wait for."""
        received = x.new_empty(sum(self.receive), x.shape[1])
        rows = x[self.rows // TOP_K]
        return received, dist.all_to_all_single(received, rows, self.receive, self.send, self.group, async_op=True)

    def compute(self, received: Tensor, experts: GatedExperts) -> Tensor:
        y = torch.empty_like(received)
        y[self.regroup] = experts(received[self.regroup], self.groups, None)
        return y

    def combine(self, y: Tensor) -> tuple[Tensor, dist.Work]:
        """Start the combine; return the outputs in the order of `rows` and the work to wait for."""
        returned = y.new_empty(len(self.rows), y.shape[1])
        return returned, dist.all_to_all_single(returned, y, self.send, self.receive, self.group, async_op=True)


def overlapped(x: Tensor, chunks: list[Chunk], experts: GatedExperts) -> Tensor:
    dispatched = [chunk.dispatch(x) for chunk in chunks]
    combined = []
    for chunk, (received, work) in zip(chunks, dispatched, strict=True):
        work.wait()
        combined.append(chunk.combine(chunk.compute(received, experts)))
    y = x.new_empty(len(x) * TOP_K, x.shape[1])
    for chunk, (returned, work) in zip(chunks, combined, strict=True):
        work.wait()
        y[chunk.rows] = returned
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
    local_experts = list(range(LOCAL))
    chunks = [Chunk(chosen, half, group) for half in (local_experts[: LOCAL // 2], local_experts[LOCAL // 2 :])]

    def sequential(compute: Callable[[Tensor], Tensor]) -> Tensor:
        return dispatcher.combine(compute(dispatcher.dispatch(x, plan, TOP_K)), plan)[plan.inverse]

    calls = {
        "sequential": lambda: sequential(lambda rows: experts(rows, plan.groups, None)),
        "overlapped": lambda: overlapped(x, chunks, experts),
        "exchanges": lambda: sequential(lambda rows: rows),
    }
    identical = torch.equal(calls["sequential"](), calls["overlapped"]())
    seconds = alternate({name: lambda call=call: (call(), dist.barrier()) for name, call in calls.items()}, ROUNDS)
    if rank == 0:
        print(
            f"{ranks} ranks, bitwise identical: {identical}; ms:",
            {name: round(1e3 * statistics.median(v), 1) for name, v in seconds.items()},
            f"sequential / overlapped {ratio(seconds['sequential'], seconds['overlapped']):.3f}",
        )


if __name__ == "__main__":
    main()
