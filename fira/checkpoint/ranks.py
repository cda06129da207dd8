"""The ranks that save or load a checkpoint together: one rank where `torch.distributed` is not initialised."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch.distributed as dist

from fira.errors import UserError

T = TypeVar("T")


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def collective_errors() -> Iterator[None]:
    """Context manager that raises a UserError or OSError of one rank as the same UserError on all ranks."""
    failure: Exception | None = None
    try:
        yield
    except (UserError, OSError) as error:
        failure = error
    messages = gather(None if failure is None else str(failure) or repr(failure))
    if failures := [message for message in messages if message]:
        raise UserError(failures[0]) from failure


def gather_results(function: Callable[[], T]) -> list[T]:
    """Call a function on every rank and return the results of all ranks, in rank order, with one exchange.

    A UserError or OSError of one rank is raised as the same UserError on all ranks.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = function()
    except (UserError, OSError) as error:
        failure = error
    results = gather((result, None if failure is None else str(failure) or repr(failure)))
    if failures := [message for _, message in results if message]:
        raise UserError(failures[0]) from failure
    return [cast(T, value) for value, _ in results]


def share_groups(groups: Sequence[list[int]], function: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """Call a function for each group of indices on one of the ranks; return all its results by index, on every rank.

    function: returns one result per index of a group. Each index is in one group. Errors are those of `gather_results`.
    """

    def own() -> dict[int, T]:
        found: dict[int, T] = {}
        for group in groups[this_rank() :: world_size()]:
            found |= zip(group, function(group), strict=True)
        return found

    results = {index: result for found in gather_results(own) for index, result in found.items()}
    return [results[index] for index in range(len(results))]
