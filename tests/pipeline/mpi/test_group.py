"""Concurrent groups, threads and operations; the store and other backends next to the MPI backend."""

import os
import signal
import threading
import time
import warnings
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.profiler import profile

from pipeline.mpi import group
from tests.launch import run_function

LARGE = 200_000  # floats: exchanged pairwise, in several rounds


def threads() -> None:
    """Three threads use separate groups at the same time."""
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
    """A rank waits for a message that is sent only after an operation that it has not waited for yet."""
    rank, one = dist.get_rank(), torch.ones(1)
    started = torch.ones(LARGE)
    reduced = dist.all_reduce(started, async_op=True)
    if rank == 0:
        dist.recv(one, 1)  # rank 1 sends when it has the sum, which needs rank 0's second round
        reduced.wait()
    else:
        reduced.wait()
        if rank == 1:
            dist.send(one, 0)
    assert (started == dist.get_world_size()).all()


def overtaking() -> None:
    """An operation starts before the second round of another one on some ranks and after it on others."""
    for _ in range(3):
        first, second = torch.ones(LARGE), torch.full((LARGE,), 2.0)
        one = dist.all_reduce(first, async_op=True)
        until = time.monotonic() + 0.05
        while dist.get_rank() == 1 and time.monotonic() < until:
            one.is_completed()
        other = dist.all_reduce(second, async_op=True)
        other.wait()
        one.wait()
        assert (first == dist.get_world_size()).all()
        assert (second == 2 * dist.get_world_size()).all()


def futures() -> None:
    """Futures are completed without a call of ``wait`` on the work."""
    works = [dist.all_reduce(torch.full((count,), 2.0), async_op=True) for count in (3, LARGE, 5)]
    for work in works:
        (tensor,) = work.get_future().wait()
        assert (tensor == 2 * dist.get_world_size()).all()
    assert all(work.is_completed() and work.is_success() for work in works)
    impatient = dist.new_group(timeout=timedelta(seconds=0.3))
    if dist.get_rank() == 0:
        future = dist.barrier(group=impatient, async_op=True).get_future()
        with pytest.raises(RuntimeError, match="Timed out"):
            future.wait()
    dist.barrier()
    if dist.get_rank() != 0:
        dist.barrier(group=impatient)


def other_threads_run() -> int:
    """Return how far another thread counts during a wait, which must release the global interpreter lock."""
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


def other_backends() -> None:
    """All ranks share one store, by which gloo groups are created."""
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


def stopped() -> None:
    """A store request times out while rank 0 is stopped; later requests succeed after it continues."""
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() == 1:
        store = dist.distributed_c10d.ProcessGroupMPI.store
        store.set_timeout(timedelta(seconds=0.3))
        os.kill(pids[0], signal.SIGSTOP)
        with pytest.raises(RuntimeError, match="no answer from rank 0"):
            store.set("late", "1")
        os.kill(pids[0], signal.SIGCONT)
        store.set_timeout(timedelta(seconds=60))
        assert store.add("late", 1) == 2
    dist.barrier()


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


def reinitialized() -> None:
    """The default group can be destroyed and created again, also with the plain backend name."""
    dist.destroy_process_group()
    dist.init_process_group("mpi")
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    assert (tensor == dist.get_world_size()).all()


def everything() -> int:
    for part in (threads, orders, overtaking, futures, other_backends, stopped, any_source, profiled):
        part()
    counted = other_threads_run()
    reinitialized()
    return counted


@pytest.mark.slow
def test_groups_threads_and_other_backends() -> None:
    counted = run_function(3, __name__, "everything", timeout=120)
    assert counted[1] > 1000


@pytest.mark.parametrize(
    ("supported", "backends", "expected"),
    [
        (False, {"cpu": "mpi", "cuda": "nccl"}, "MPIProcessGroup"),  # up to torch 2.13
        (True, {"cpu": "mpi", "cuda": "nccl"}, "MPIBackend"),
        (True, {"cpu": "mpi", "cuda": "mpi"}, "MPIProcessGroup"),
        (True, None, "MPIProcessGroup"),
    ],
)
def test_class_of_a_group_by_torch_version_and_backends(monkeypatch, supported, backends, expected) -> None:
    """Only a group that uses another backend for another device needs the class of newer versions of torch."""
    config = backends and SimpleNamespace(get_device_backend_map=lambda: backends)
    monkeypatch.setattr(group, "SUPPORTS_PYTHON_BACKENDS", supported)
    monkeypatch.setattr(group, "_arguments_of_new_group", lambda: {"backend_config": config})
    factory = object.__new__(group.GroupFactory)
    monkeypatch.setattr(factory, "make", lambda kind, *_: kind)
    kind = factory.create([0, 1])
    assert getattr(kind, "func", kind).__name__ == expected
