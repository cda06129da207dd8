"""Usable numbers of ranks, and the micro-batch size that they have in common."""

import pytest

from fira.errors import UserError
from fira.supervisor.elastic_layouts import elastic, parse_range, threads_per_rank
from fira.training.config import TrainConfig
from fira.training.setup import choose_microbatch
from pipeline.mesh import Layout


def test_ranges(monkeypatch: pytest.MonkeyPatch):
    assert list(parse_range("2:4")) == [2, 3, 4]
    assert list(parse_range("4")) == [4]
    assert list(parse_range(None)) == [1]
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert list(parse_range(None)) == [8]


@pytest.mark.parametrize("text", ["0:4", "4:2", "a:b", "1:2:3", ":4", "-1:2", "1:999999", ""])
def test_invalid_ranges_are_refused(text: str):
    with pytest.raises(UserError, match="such as 2:4"):
        parse_range(text or "x")


def test_every_number_of_ranks_runs_with_the_micro_batch_size_of_the_smallest_share():
    config = TrainConfig(elastic="1:4")  # fira-tiny: 16 sequences, 6 layers
    found = elastic(config)
    assert found.layouts == {1: Layout(1, 1, 1), 2: Layout(2, 1, 1), 3: Layout(3, 1, 1), 4: Layout(2, 2, 2)}
    assert found.microbatch == min(choose_microbatch(config, 16, layout) for layout in found.layouts.values()) == 2


def test_numbers_of_ranks_that_do_not_fit_the_layout_are_not_used():
    found = elastic(TrainConfig(elastic="1:6", pp=2))
    assert sorted(found.layouts) == [2, 4, 6]
    assert [found.usable(slots) for slots in (1, 2, 3, 5, 100)] == [None, 2, 2, 4, 6]
    with pytest.raises(UserError, match="no number of ranks is possible: --pp 4"):
        elastic(TrainConfig(elastic="1:3", pp=4))


def test_a_run_keeps_its_micro_batch_size():
    assert elastic(TrainConfig(elastic="1:4", micro_batch_size=8)).microbatch == 8


def test_all_jobs_have_the_threads_of_the_largest_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert threads_per_rank(4, None) == 4
    assert threads_per_rank(32, None) == 1
    assert threads_per_rank(32, {"a": 8, "b": 4}) == 2
    assert threads_per_rank(4, {"a": 8}) == 4
