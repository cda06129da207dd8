"""CUDA tensors staged through the host: simulated on the CPU, and on a GPU if there is one."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.mpi import staging
from tests.launch import run_function
from tests.pipeline.mpi import test_operations as operations


class SlowLane:
    """Simulation of copies on a stream: ordered and asynchronous."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._looks = 0

    def follow(self, event: None) -> None:
        """There is no stream."""

    def copy(self, target: Tensor, source: Tensor) -> Callable[[], bool]:
        self._copies.append((target, source))
        number = self._done + len(self._copies)
        return lambda: self._look() >= number

    _done = 0

    def _look(self) -> int:
        self._looks += 1
        if self._copies and self._looks % 3 == 0:
            target, source = self._copies.pop(0)
            target.copy_(source)
            self._done += 1
        return self._done


def simulate() -> None:
    """Run all operations with staged float32 tensors of several pieces, mixed with tensors that are not staged."""
    from pipeline.mpi import operations as calls

    lanes = SlowLane(), SlowLane()
    staging.lanes = lambda device: lanes  # type: ignore[assignment]
    staging.current_work = lambda device: None  # type: ignore[assignment, return-value]
    staging.PIECE_BYTES = 100_000
    calls.on_device = lambda tensor: tensor.dtype == torch.float32
    operations.FLOATS, operations.INTEGERS, operations.OTHERS = [torch.float32], [torch.int64], []
    operations.SHAPES, operations.OPS = [(0,), (2, 3), (300, 301)], {"AVG": operations.OPS["AVG"]}
    operations.reductions()
    operations.movements()
    operations.aliases()
    operations.uneven()
    concurrently()


def concurrently(device: str = "cpu") -> None:
    """Run several operations at once: messages keep their order, and receives return the sender."""
    rank, size = dist.get_rank(), dist.get_world_size()
    many = [torch.full((50_000,), float(number), device=device, dtype=torch.float32) for number in range(6)]
    many.insert(3, torch.ones(7, dtype=torch.float64))
    works = [dist.all_reduce(tensor, async_op=True) for tensor in many]
    for work in works[::-1]:
        work.wait()
    for number, tensor in zip((0, 1, 2, 1, 3, 4, 5), many, strict=True):
        assert (tensor == number * size).all()

    if rank == 0:
        sent = [dist.isend(torch.full((3,), float(number), device=device), 1) for number in range(4)]
        for work in sent[::-1]:
            work.wait()
    elif rank == 1:
        got = [torch.zeros(3, device=device) for _ in range(4)]
        received = [dist.irecv(tensor, 0) for tensor in got]
        for work in received[::-1]:
            work.wait()
        assert [tensor[0].item() for tensor in got] == [0, 1, 2, 3]
        dist.send(got[3], 2)
    else:
        got = torch.zeros(3, device=device)
        assert dist.recv(got) == 1
        assert got.tolist() == [3.0] * 3


def on_gpu() -> list[str]:
    """Three ranks on one or more GPUs: kernels before and after an operation, on the current and another stream."""
    from pipeline.mpi.cuda_transport import cuda_backend

    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    size = dist.get_world_size()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            x = torch.randn(4096, 4096, device=device)
            for _ in range(10):
                x = x @ x / 4096  # still running when the operation is called
            total = x.clone()
            dist.all_reduce(total)
            gathered = torch.empty(size, *x.shape, device=device)
            dist.all_gather_into_tensor(gathered, x)
            torch.testing.assert_close(total, gathered.sum(0))
    concurrently("cuda")
    return [cuda_backend([device])]


@pytest.mark.parametrize("in_place", [False, True])
def test_copies_follow_the_work_at_the_call_even_if_the_steps_start_later(monkeypatch, in_place: bool) -> None:
    """Steps that are queued behind another operation are started later, possibly by a thread with another stream."""
    work, followed = ["before the call"], []

    class Lane(SlowLane):
        def follow(self, event: str) -> None:
            followed.append(event)

    monkeypatch.setattr(staging, "lanes", lambda device: (Lane(), Lane()))
    monkeypatch.setattr(staging, "current_work", lambda device: work[-1])
    inputs = [torch.arange(6.0).view(2, 3).T]
    outputs = inputs if in_place else [torch.zeros(3, 2)]
    steps = staging.staged(lambda inputs, outputs: iter(()), inputs, outputs)
    work.append("after the call")
    next(steps)
    assert followed == ["before the call"] * 2


def test_operations_on_a_simulated_device() -> None:
    run_function(operations.SIZE, __name__, "simulate", timeout=120)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_operations_on_a_device() -> None:
    backends = run_function(3, __name__, "on_gpu", timeout=170)
    assert backends == [["nccl" if torch.cuda.device_count() >= 3 and dist.is_nccl_available() else "mpi"]] * 3
