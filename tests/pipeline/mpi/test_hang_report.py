"""Hang reports from traces, without MPI. The traces are written by the code that ranks use."""

from typing import Any

import pytest
import torch

from pipeline.mpi.hang_report import HangReport
from pipeline.mpi.trace import LAST, Entry, GroupTrace, Trace


class Rank:
    """Trace of one rank with one group of all ranks."""

    def __init__(self, size: int) -> None:
        self.trace = Trace()
        self.group = GroupTrace(self.trace, list(range(size)))
        self.group.name, self.group.description = "0", "ep"

    def call(self, operation: str, *shape: int, peer: int = -1, detail: Any = None, **kwargs: Any) -> Entry:
        return self.group.begin(operation, [torch.zeros(shape, **kwargs)] if shape else [], peer, detail)

    def done(self, *args: Any, **kwargs: Any) -> None:
        self.call(*args, **kwargs).end(None)

    def waits(self, *args: Any, **kwargs: Any) -> None:
        self.call(*args, **kwargs).__enter__()


def ranks(size: int) -> list[Rank]:
    return [Rank(size) for _ in range(size)]


def report(job: list[Rank], **silent: str) -> list[str]:
    """Return the lines of the report. Keyword ``rank2="reason"`` marks a rank as silent."""
    silent_ranks = {int(name.removeprefix("rank")): why for name, why in silent.items()}
    return HangReport(
        {rank: one.trace.as_json() for rank, one in enumerate(job) if rank not in silent_ranks}, silent_ranks
    ).text()


def test_missing_rank_is_reported_with_its_last_operation() -> None:
    job = ranks(4)
    for rank in (0, 1, 3):
        job[rank].waits("all_to_all_single", 4, 1024)
    job[2].done("recv", 7, peer=1, detail=5)
    lines = report(job)
    assert lines[0].startswith("ranks 0, 1, 3 wait in all_to_all_single #1 (group ep of ranks 0–3; 4×1024 float32), ")
    assert lines[1].startswith(
        "rank 2 never entered all_to_all_single #1 (group ep of ranks 0–3; 4×1024 float32); its last operation was "
        "recv #1 from rank 1, tag 5, test_hang_report.py:"
    )
    assert lines[2:] == ["look first at rank 2"]


def test_line_of_the_call() -> None:
    (rank,) = ranks(1)

    def method() -> Entry:
        return rank.group.begin("barrier", [])

    def torch_function() -> Entry:
        return method()  # the innermost call outside of the group's method

    line = torch_function.__code__.co_firstlineno + 1
    assert torch_function().as_json(False)["where"] == f"{__file__}:{line}"


@pytest.mark.parametrize(
    ("there", "here", "line"),
    [
        (("all_reduce", 4), ("all_reduce", 8), "the sizes of #1 in group ep of ranks 0, 1 differ"),
        (("all_reduce", 4), ("broadcast", 4), "the operations of #1 in group ep of ranks 0, 1 differ"),
    ],
)
def test_mismatch_is_reported(there: tuple, here: tuple, line: str) -> None:
    first, second = job = ranks(2)
    first.waits(*there)
    second.done(*here)
    (found, *_) = report(job)
    assert found.startswith(line)
    assert f"rank 0 called {there[0]} of 4 float32" in found
    assert f"rank 1 called {here[0]} of {here[1]} float32" in found


def test_other_mismatches() -> None:
    for attribute, first, second in (
        ("dtypes", {}, {"dtype": torch.float64}),
        ("roots", {"peer": 0}, {"peer": 1}),
    ):
        job = ranks(2)
        job[0].waits("broadcast", 4, **first)
        job[1].waits("broadcast", 4, **second)
        assert report(job)[0].startswith(f"the {attribute} of #1")


def test_collectives_in_different_order() -> None:
    first, second = job = ranks(2)
    first.done("broadcast", 4, peer=0)
    first.waits("all_reduce", 4)
    second.waits("all_reduce", 4)
    assert report(job)[0].endswith("(the order differs)")


def test_mismatched_split_sizes() -> None:
    first, second = job = ranks(2)
    first.waits("all_to_all_single", 3, 8, detail=([1, 2], [1, 3]))
    second.waits("all_to_all_single", 4, 8, detail=([3, 1], [1, 1]))
    assert report(job)[0].startswith("the sizes of all_to_all_single #1 differ: rank 0 sends 2 rows to rank 1, ")
    assert "which expects 1" in report(job)[0]


def test_equal_numbers_of_elements_match() -> None:
    first, second = job = ranks(2)
    first.waits("all_reduce", 4, 1)
    second.waits("all_reduce", 4)
    assert not [line for line in report(job) if "differ" in line]


def test_receive_without_send() -> None:
    first, second = job = ranks(2)
    first.waits("recv", 3, peer=1, detail=5)
    second.done("send", 3, peer=0, detail=6)
    lines = report(job)
    assert lines[0].startswith("rank 0 waits in recv #1 from rank 1, tag 5 (group ep of ranks 0, 1; 3 float32)")
    assert lines[1].startswith("rank 1 never sent it, only messages with tag 6; its last operation was send #1 to ")
    assert lines[2] == "look first at rank 1"


def test_send_without_receive_and_mismatched_message_size() -> None:
    first, second = job = ranks(2)
    first.waits("send", 3, peer=1, detail=0)
    assert report(job)[1].startswith("rank 1 never received it; it has not begun any operation yet")
    second.waits("recv", 4, peer=0, detail=0)
    assert report(job)[0].startswith("message #1 from rank 0 to rank 1 is sent as 3 float32, ")


def test_ranks_waiting_for_each_other() -> None:
    first, second = job = ranks(2)
    first.waits("recv", 3, peer=1, detail=0)
    second.waits("recv", 3, peer=0, detail=0)
    assert report(job)[-1] == "ranks 0, 1 wait for each other"


def test_silent_ranks_are_reported_first() -> None:
    job = ranks(3)
    job[0].waits("barrier")
    job[1].waits("barrier")
    lines = report(job, rank2="it is stopped")
    assert lines[1:] == ["rank 2 did not answer: it is stopped", "look first at rank 2"]


def test_operation_that_is_started_but_not_waited_for() -> None:
    first, second = job = ranks(2)
    first.waits("all_reduce", 4)
    second.call("all_reduce", 4)
    assert report(job)[1].startswith("rank 1 has entered it, but does not wait for it; its last operation was all_red")


def test_report_without_waits() -> None:
    job = ranks(2)
    for one in job:
        one.done("all_reduce", 4)
    assert report(job) == ["no rank waits for another"]


def test_trace_keeps_operations_that_are_waited_for() -> None:
    first, second = job = ranks(2)
    first.waits("barrier")
    second.done("barrier")
    for number in range(LAST + 1):
        first.done("recv", 1, peer=1, detail=number)
        second.done("all_reduce", 1)
    assert len(second.trace.as_json()["operations"]) == LAST
    lines = report(job)
    assert lines[0].startswith("rank 0 waits in barrier #1")
    assert not [line for line in lines if "never entered" in line]
