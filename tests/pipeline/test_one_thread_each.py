"""Computations on a pool of threads: the number of threads of each, of the caller, and of threads that begin later."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.one_thread_each import OneThreadEach


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_each_computation_has_one_thread_and_the_caller_keeps_its_own(threads: int) -> None:
    results = [*OneThreadEach().map(lambda item: (item, torch.get_num_threads()), range(20))]
    assert results == [(item, 1) for item in range(20)]
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == threads


def test_an_error_of_a_computation_is_raised(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(OneThreadEach().map(lambda item: 1 / item, [1, 0]))
