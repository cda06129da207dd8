"""The checksum by which ranks find that they have called different collectives."""

from collections.abc import Callable

import pytest
import torch

from pipeline.mpi.trace import GroupTrace, Trace

SIZE = 3


def total(calls: Callable[[int, GroupTrace], None]) -> int:
    """The sum of the checksums of SIZE ranks, each with a group of all ranks and a group of ranks 1 and 2."""
    traces = [Trace() for _ in range(SIZE)]
    for rank, trace in enumerate(traces):
        calls(rank, GroupTrace(trace, list(range(SIZE))))
        if rank:
            calls(rank, GroupTrace(trace, [1, 2]))
    return sum(trace.checksum(rank) for rank, trace in enumerate(traces))


def test_equal_collectives_have_the_sum_0() -> None:
    def calls(rank: int, group: GroupTrace) -> None:
        group.begin("all_reduce", [torch.zeros(4)])
        group.begin("broadcast", [torch.zeros(2, dtype=torch.int64)], peer=0)
        group.begin("all_to_all_single", [torch.zeros(rank)])  # sizes may differ
        for _ in range(rank):
            group.begin("send", [torch.zeros(1)], peer=0)  # messages may differ

    assert total(calls) == 0


def test_no_collective_has_the_sum_0() -> None:
    assert total(lambda rank, group: None) == 0


@pytest.mark.parametrize("different", range(SIZE))
@pytest.mark.parametrize("difference", ["missing", "size", "dtype", "operation", "order"])
def test_different_collectives_are_found(different: int, difference: str) -> None:
    def calls(rank: int, group: GroupTrace) -> None:
        names = ["all_reduce", "barrier"]
        tensor, other = torch.zeros(4), rank == different
        if other and difference == "order":
            names.reverse()
        if other and difference == "operation":
            names[0] = "broadcast"
        if other and difference == "size":
            tensor = torch.zeros(2)
        if other and difference == "dtype":
            tensor = torch.zeros(4, dtype=torch.float64)
        for name in names[: 1 if other and difference == "missing" else 2]:
            group.begin(name, [tensor] if name != "barrier" else [])
        group.begin("all_reduce", [torch.zeros(1)])

    assert total(calls) != 0
