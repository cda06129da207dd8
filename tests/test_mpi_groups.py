"""Several groups, threads and operations at once; the store and the other backends beside ours."""

import threading
import time
import warnings

import torch
import torch.distributed as dist
from torch.profiler import profile

from tests.ranks import run_function

LARGE = 200_000  # floats: exchanged pairwise, in several rounds


def threads() -> None:
    """Each of three threads works on a group of its own, all at the same time."""
    groups = [dist.new_group() for _ in range(3)]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for count in (10, LARGE) * 10:
                tensor = torch.full((count,), float(number))
                dist.all_reduce(tensor, group=groups[number])
                assert (tensor == number * dist.get_world_size()).all()
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures, failures


def orders() -> None:
    """A rank waits for a message that is sent only after an operation it has not waited for yet."""
    rank, one = dist.get_rank(), torch.ones(1)
    started = torch.ones(LARGE)
    reduced = dist.all_reduce(started, async_op=True)
    if rank == 0:
        dist.recv(one, 1)  # rank 1 sends when the sum is there, which takes rank 0's second round
        reduced.wait()
    else:
        reduced.wait()
        if rank == 1:
            dist.send(one, 0)
    assert (started == dist.get_world_size()).all()


def futures() -> None:
    """Futures are completed though nobody calls ``wait`` on the work."""
    works = [dist.all_reduce(torch.full((count,), 2.0), async_op=True) for count in (3, LARGE, 5)]
    for work in works:
        (tensor,) = work.get_future().wait()
        assert (tensor == 2 * dist.get_world_size()).all()
    assert all(work.is_completed() and work.is_success() for work in works)


def other_threads_run() -> int:
    """How far another thread counts while this one waits: the wait gives the interpreter away."""
    counted = 0
    waiting = True

    def count() -> None:
        nonlocal counted
        while waiting:
            counted += 1

    dist.barrier()
    if dist.get_rank() == 0:
        time.sleep(0.5)
        dist.send(torch.ones(1), 1)
    elif dist.get_rank() == 1:
        thread = threading.Thread(target=count)
        thread.start()
        dist.recv(torch.ones(1), 0)
        waiting = False
        thread.join()
    return counted


def neighbours() -> None:
    """The store is one for all ranks; gloo groups are made by it beside ours."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    store.set(f"key {rank}", bytes([rank, 0, 255]))
    assert store.get(f"key {(rank + 1) % size}") == bytes([(rank + 1) % size, 0, 255])
    store.add("sum", rank)
    dist.barrier()
    assert store.add("sum", 0) == size * (size - 1) // 2
    gloo = dist.new_group(backend="gloo")
    tensor = torch.ones(5)
    dist.all_reduce(tensor, group=gloo)
    assert (tensor == size).all()
    local = dist.new_group([0, 1], use_local_synchronization=True)
    if rank < 2:
        dist.all_reduce(tensor, group=local)
        assert (tensor == 2 * size).all()
    messages = [None] * size
    dist.all_gather_object(messages, {"rank": rank})
    assert messages == [{"rank": other} for other in range(size)]


def any_source() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        senders = set()
        for _ in range(size - 1):
            tensor = torch.empty(2)
            sender = dist.recv(tensor, tag=9)
            assert (tensor == sender).all()
            senders.add(sender)
        assert senders == set(range(1, size))
    else:
        dist.send(torch.full((2,), float(rank)), 0, tag=9)


def profiled() -> None:
    with warnings.catch_warnings(), profile() as profiler:
        warnings.simplefilter("ignore")
        dist.all_reduce(torch.ones(3))
    assert any(event.name == "mpi:all_reduce" for event in profiler.events())


def again() -> None:
    """A world can be ended and begun again, under the plain name, too."""
    dist.destroy_process_group()
    dist.init_process_group("mpi")
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    assert (tensor == dist.get_world_size()).all()


def everything() -> int:
    for part in (threads, orders, futures, neighbours, any_source, profiled):
        part()
    counted = other_threads_run()
    again()
    return counted


def test_groups_threads_and_neighbours() -> None:
    counted = run_function(3, __name__, "everything", timeout=120)
    assert counted[1] > 1000
