"""Process groups that follow NCCL's rules on the CPU, so that a program that breaks them stops instead of passing.

| rule of NCCL | here |
|---|---|
| A communicator is created by the first operation, which blocks the host until all its ranks have come. | `_create` |
| Point-to-point operations use a communicator of the two ranks, collectives one of the whole group. | `_begin` |
| A communicator executes its operations one at a time, in the order in which they were posted. | `_Communicator` |
| A send ends when its receive is executed; messages are matched by their order alone, not by a tag. | `_match` |

A wait that exceeds LIMIT_S ends the job with a message that names the operations in the queue. Unlike on a GPU, `wait`
blocks the host; `tests/integration/nccl_replay.py` simulates the streams of a device.
"""

import os
import queue
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.mpi import failure, group
from pipeline.mpi.group import MPIProcessGroup
from pipeline.mpi.work import Steps

LIMIT_S = float(os.environ.get("STRICT_GROUP_LIMIT_S", 60))
DATA, READY, CREATE_PAIR, CREATE_GROUP = range(4)  # tags of MPI messages
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32]


def install() -> None:
    """Make all process groups that are created from now on strict. The default group remains as it is."""
    group.MPIProcessGroup = StrictGroup  # type: ignore[misc]


class StrictGroup(MPIProcessGroup):
    """A process group whose operations are executed by the threads of its communicators."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._communicators: dict[int, _Communicator] = {}

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> "_Work":  # type: ignore[override]
        return super().send(tensors, peer, DATA)  # type: ignore[return-value]

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> "_Work":  # type: ignore[override]
        return super().recv(tensors, peer, DATA)  # type: ignore[return-value]

    def _begin(  # type: ignore[override]
        self, name: str, steps: Steps, inputs: list[Tensor], outputs: list[Tensor], peer: int = -1, detail: Any = None
    ) -> "_Work":
        message = name in ("send", "recv")
        communicator = self._communicators.get(peer if message else -1) or self._create(peer if message else -1)

        def execute() -> None:
            if message:
                self._match(name, (inputs or outputs)[0], peer)
            super(StrictGroup, self)._begin(name, steps, inputs, outputs, peer, detail).wait()

        return communicator.enqueue(execute, f"{name} with rank {peer}" if message else name)

    def _create(self, peer: int) -> "_Communicator":
        """Create the communicator with one peer, or with all ranks of the group for −1, as soon as all have come."""
        tag, peers = (CREATE_GROUP, range(self._size)) if peer < 0 else (CREATE_PAIR, [peer])
        deadline = time.monotonic() + LIMIT_S
        works = [self._message(call, other, tag) for other in peers if other != self._rank for call in ("send", "recv")]
        missing = [work.entry.peer for work in works if not work.finished_by(deadline)]
        if missing:
            _end(f"{self._where()}: no answer from rank {missing[0]} to the creation of a communicator")
        self._communicators[peer] = _Communicator(self._where())
        return self._communicators[peer]

    def _match(self, name: str, tensor: Tensor, peer: int) -> None:
        """Wait until the other rank executes the opposite operation. Raises ValueError if the tensors differ."""
        own = torch.tensor([tensor.numel(), DTYPES.index(tensor.dtype)])
        if name == "recv":
            self._message("send", peer, READY, own).wait()
            return
        other = torch.empty_like(own)
        self._message("recv", peer, READY, other).wait()
        if not own.equal(other):
            sent, received = (f"{int(count)} × {DTYPES[kind]}" for count, kind in (own, other))
            raise ValueError(f"{self._where()}: rank {peer} receives {received}, but this rank sends {sent}")

    def _message(self, call: str, peer: int, tag: int, tensor: Tensor | None = None) -> Any:
        """Send or receive by MPI, at once."""
        tensor = torch.zeros(1) if tensor is None else tensor
        steps = getattr(self._steps, call)(tensor, peer, tag)
        return super()._begin(call, steps, [tensor], [tensor], peer, tag)

    def _where(self) -> str:
        return f"rank {dist.get_rank()} in the group {self._trace.description!r} of ranks {self._trace.ranks}"


class _Communicator:
    """A thread that executes operations first in, first out."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.pending: list[str] = []  # the operation in progress and those behind it
        self._queue: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def enqueue(self, execute: Any, name: str) -> "_Work":
        work = _Work(self, execute)
        self.pending.append(name)
        self._queue.put(work)
        return work

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            work.execute()  # an error ends the job
            del self.pending[0]
            work.done.set()


class _Work(dist.Work):
    """An operation of a communicator."""

    def __init__(self, communicator: _Communicator, execute: Any) -> None:
        super().__init__()
        self.communicator = communicator
        self.execute = execute
        self.done = threading.Event()

    def wait(self, timeout: Any = None) -> bool:
        if not self.done.wait(LIMIT_S):
            _end(f"{self.communicator.where}: not executed: {', '.join(self.communicator.pending)}")
        return True

    def is_completed(self) -> bool:
        return self.done.is_set()


def _end(problem: str) -> None:
    """End the job on all ranks."""
    failure.fail(f"deadlock under NCCL's rules after {LIMIT_S:g} s: {problem}", 3)
