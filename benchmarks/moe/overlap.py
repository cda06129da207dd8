"""Benchmark of expert parallelism: overlap of the all-to-all exchanges with the experts' products.

    mpirun -np 2 python -m benchmarks.moe.overlap

The experts are spread over pairs of ranks. `sequential` is the dispatcher with one part: dispatch all rows, compute all
experts, return all rows. `overlapped` is the dispatcher with two parts, as on GPUs of several machines: both dispatches
start at the same time, the first half is computed during the second dispatch, and its outputs return while the second
half is computed.
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
from fira.nn.moe.dispatcher import RunExperts
from fira.nn.moe.experts import GatedExperts
from fira.parallel.expert_parallel import AllToAllDispatcher

ROUNDS = 15
TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K, EP = 2048, 384, 768, 8, 2, 2


@torch.inference_mode()
def main() -> None:
    pipeline.init()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    groups = [dist.new_group(list(range(first, first + EP))) for first in range(0, ranks, EP)]
    group = groups[rank // EP]
    torch.manual_seed(rank)
    experts = GatedExperts(EXPERTS // EP, WIDTH, HIDDEN, F.silu)
    for parameter in experts.parameters():
        parameter.normal_(std=0.02)
    x, chosen = torch.randn(TOKENS, WIDTH), torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices

    def call(parts: int, run_experts: RunExperts) -> Callable[[], Tensor]:
        dispatcher = AllToAllDispatcher(group, parts)
        plan = dispatcher.plan(chosen, EXPERTS)
        return lambda: dispatcher.run(x, None, plan, TOP_K, run_experts)[plan.inverse]

    calls = {
        "sequential": call(1, experts),
        "overlapped": call(2, experts),
        "exchanges": call(1, lambda rows, groups, keys: rows),
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
