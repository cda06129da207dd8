"""The report from ranks' traces, without MPI: traces are written by the same code that ranks use."""

from typing import Any

import pytest
import torch

from pipeline.mpi.hang_report import HangReport
from pipeline.mpi.trace import LAST, Entry, GroupTrace, Trace


class Rank:
    """One rank's trace, with one group over all ranks."""

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
    gone = {int(name.removeprefix("rank")): why for name, why in silent.items()}
    return HangReport({rank: one.trace.as_json() for rank, one in enumerate(job) if rank not in gone}, gone).text()


def test_a_rank_that_never_came_is_named_with_what_it_did_last() -> None:
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


def test_the_line_of_the_call_is_right() -> None:
    (rank,) = ranks(1)

    def method() -> Entry:
        return rank.group.begin("barrier", [])

    def torch_function() -> Entry:
        return method()  # the innermost call that is not the group's own

    line = torch_function.__code__.co_firstlineno + 1
    assert torch_function().as_json(False)["where"] == f"{__file__}:{line}"


@pytest.mark.parametrize(
    ("there", "here", "line"),
    [
        (("all_reduce", 4), ("all_reduce", 8), "the sizes of #1 in group ep of ranks 0, 1 differ"),
        (("all_reduce", 4), ("broadcast", 4), "the operations of #1 in group ep of ranks 0, 1 differ"),
    ],
)
def test_a_mismatch_is_named(there: tuple, here: tuple, line: str) -> None:
    one, other = job = ranks(2)
    one.waits(*there)
    other.done(*here)
    (found, *_) = report(job)
    assert found.startswith(line)
    assert f"rank 0 called {there[0]} of 4 float32" in found
    assert f"rank 1 called {here[0]} of {here[1]} float32" in found


def test_other_mismatches() -> None:
    for what, one, other in (
        ("dtypes", {}, {"dtype": torch.float64}),
        ("roots", {"peer": 0}, {"peer": 1}),
    ):
        job = ranks(2)
        job[0].waits("broadcast", 4, **one)
        job[1].waits("broadcast", 4, **other)
        assert report(job)[0].startswith(f"the {what} of #1")


def test_two_collectives_in_another_order() -> None:
    one, other = job = ranks(2)
    one.done("broadcast", 4, peer=0)
    one.waits("all_reduce", 4)
    other.waits("all_reduce", 4)
    assert report(job)[0].endswith("(the order differs)")


def test_rows_that_are_sent_but_not_expected() -> None:
    one, other = job = ranks(2)
    one.waits("all_to_all_single", 3, 8, detail=([1, 2], [1, 3]))
    other.waits("all_to_all_single", 4, 8, detail=([3, 1], [1, 1]))
    assert report(job)[0].startswith("the sizes of all_to_all_single #1 differ: rank 0 sends 2 rows to rank 1, ")
    assert "which expects 1" in report(job)[0]


def test_equal_numbers_of_elements_are_no_mismatch() -> None:
    one, other = job = ranks(2)
    one.waits("all_reduce", 4, 1)
    other.waits("all_reduce", 4)
    assert not [line for line in report(job) if "differ" in line]


def test_a_receive_without_a_send() -> None:
    one, other = job = ranks(2)
    one.waits("recv", 3, peer=1, detail=5)
    other.done("send", 3, peer=0, detail=6)
    lines = report(job)
    assert lines[0].startswith("rank 0 waits in recv #1 from rank 1, tag 5 (group ep of ranks 0, 1; 3 float32)")
    assert lines[1].startswith("rank 1 never sent it, only messages with tag 6; its last operation was send #1 to ")
    assert lines[2] == "look first at rank 1"


def test_a_send_nobody_takes_and_a_message_of_another_size() -> None:
    one, other = job = ranks(2)
    one.waits("send", 3, peer=1, detail=0)
    assert report(job)[1].startswith("rank 1 never received it; it has not begun any operation yet")
    other.waits("recv", 4, peer=0, detail=0)
    assert report(job)[0].startswith("message #1 from rank 0 to rank 1 is sent as 3 float32, ")


def test_ranks_that_wait_for_each_other() -> None:
    one, other = job = ranks(2)
    one.waits("recv", 3, peer=1, detail=0)
    other.waits("recv", 3, peer=0, detail=0)
    assert report(job)[-1] == "ranks 0, 1 wait for each other"


def test_silent_ranks_are_named_and_suspected() -> None:
    job = ranks(3)
    job[0].waits("barrier")
    job[1].waits("barrier")
    lines = report(job, rank2="it is stopped")
    assert lines[1:] == ["rank 2 did not answer: it is stopped", "look first at rank 2"]


def test_an_operation_that_was_begun_but_is_not_waited_for() -> None:
    one, other = job = ranks(2)
    one.waits("all_reduce", 4)
    other.call("all_reduce", 4)
    assert report(job)[1].startswith("rank 1 has entered it, but does not wait for it; its last operation was all_red")


def test_nothing_wrong() -> None:
    job = ranks(2)
    for one in job:
        one.done("all_reduce", 4)
    assert report(job) == ["no rank waits for another"]


def test_the_trace_forgets_but_not_what_is_waited_for() -> None:
    one, other = job = ranks(2)
    one.waits("barrier")
    other.done("barrier")
    for number in range(LAST + 1):
        one.done("recv", 1, peer=1, detail=number)
        other.done("all_reduce", 1)
    assert len(other.trace.as_json()["operations"]) == LAST
    lines = report(job)
    assert lines[0].startswith("rank 0 waits in barrier #1")
    assert not [line for line in lines if "never entered" in line]
