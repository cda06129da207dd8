"""Random sequences of operations on random groups: the results of the MPI backend and gloo agree."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.launch import run_function

GROUPS = [[0, 1, 2], [0, 2], [2, 1]]
OPERATIONS = ["all_reduce", "reduce", "broadcast", "all_gather", "gather", "scatter"]
OPERATIONS += ["reduce_scatter", "all_to_all", "ring"]
Group = dist.ProcessGroup
dtypes = st.sampled_from([torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.int8])
steps = st.fixed_dictionaries(
    {
        "operation": st.sampled_from(OPERATIONS),
        "group": st.integers(0, len(GROUPS) - 1),
        "dtype": dtypes,
        "rows": st.sampled_from([0, 1, 2, 7, 64, 9001]),
        "columns": st.sampled_from([1, 3, 8]),
        "reduction": st.sampled_from(["SUM", "MIN", "MAX", "PRODUCT"]),
        "root": st.integers(0, 1),
        "splits": st.lists(st.integers(0, 5), min_size=9, max_size=9),
        "asynchronous": st.booleans(),
        "seed": st.integers(0, 2**30),
    }
)


def compare(examples: int) -> int:
    """Run equal examples on every rank. Return the number of compared operations."""
    mpi = [dist.new_group(ranks, sort_ranks=False) for ranks in GROUPS]
    gloo = [dist.new_group(ranks, backend="gloo", sort_ranks=False) for ranks in GROUPS]
    compared = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # shrinking would differ between ranks
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(steps, min_size=1, max_size=6))
    def check(sequence: list[dict[str, Any]]) -> None:
        nonlocal compared
        mpi_runs = [run(step, mpi[step["group"]]) for step in sequence]
        gloo_runs = [run(step, gloo[step["group"]]) for step in sequence]
        for step, results, expected in zip(sequence, finished(mpi_runs), finished(gloo_runs), strict=True):
            compared += len(results)
            for a, b in zip(results, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=0, msg=lambda text, step=step: f"{step}\n{text}")

    check()
    return compared


def finished(runs: list[tuple[list[Tensor], list[dist.Work]]]) -> list[list[Tensor]]:
    for _, works in reversed(runs):
        for work in works:
            work.wait()
    return [results for results, _ in runs]


def run(step: dict[str, Any], group: Group) -> tuple[list[Tensor], list[dist.Work]]:
    """Start one operation. Return its output tensors and its works."""
    if dist.get_rank(group) < 0:
        return [], []
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(step["seed"] + rank)
    make = functools.partial(random, step, generator)
    own, empty, root = make(), torch.zeros(step["rows"], step["columns"], dtype=step["dtype"]), step["root"]
    op = getattr(dist.ReduceOp, step["reduction"])
    keywords = {"group": group, "async_op": step["asynchronous"]}
    outputs = [torch.zeros_like(empty) for _ in range(size)]
    match step["operation"]:
        case "all_reduce":
            return [own], works(dist.all_reduce(own, op, **keywords))
        case "reduce":
            started = works(dist.reduce(own, group_dst=root, op=op, **keywords))
            return [own] if rank == root else [], started  # elsewhere gloo leaves partial sums
        case "broadcast":
            return [own], works(dist.broadcast(own, group_src=root, **keywords))
        case "all_gather":
            return outputs, works(dist.all_gather(outputs, own, **keywords))
        case "gather":
            started = works(dist.gather(own, outputs if rank == root else None, group_dst=root, **keywords))
            return outputs, started
        case "scatter":
            parts = [make() for _ in range(size)] if rank == root else None
            return [empty], works(dist.scatter(empty, parts, group_src=root, **keywords))
        case "reduce_scatter":
            inputs = torch.cat([make() for _ in range(size)])
            return [empty], works(dist.reduce_scatter_tensor(empty, inputs, op, **keywords))
        case "all_to_all":
            table = torch.tensor(step["splits"]).view(3, 3)[:size, :size]
            sent, received = table[rank].tolist(), table[:, rank].tolist()
            output = torch.zeros(sum(received), step["columns"], dtype=step["dtype"])
            given = torch.cat([random({**step, "rows": rows}, generator) for rows in sent])
            return [output], works(dist.all_to_all_single(output, given, received, sent, **keywords))
        case "ring":
            right = dist.P2POp(dist.isend, own, group=group, tag=5, group_peer=(rank + 1) % size)
            left = dist.P2POp(dist.irecv, empty, group=group, tag=5, group_peer=(rank - 1) % size)
            return [empty], dist.batch_isend_irecv([right, left])
    raise AssertionError(step)


def random(step: dict[str, Any], generator: torch.Generator) -> Tensor:
    shape = step["rows"], step["columns"]
    if step["dtype"].is_floating_point:
        return torch.rand(shape, generator=generator, dtype=step["dtype"]) + 0.5
    return torch.randint(0, 100, shape, generator=generator).to(step["dtype"])


def works(work: dist.Work | None) -> list[dist.Work]:
    return [work] if work is not None else []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_random_sequences_agree_with_gloo() -> None:
    compared = run_function(3, __name__, "compare", timeout=280, examples=500)
    assert min(compared) > 500
