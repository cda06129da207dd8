"""Operations in progress: MPI requests, the steps that follow them, and how to wait for both."""

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from typing import Any

import torch
from mpi4py import MPI
from torch.distributed import Work

from pipeline.mpi.trace import Entry

# The steps of an operation are a generator. It yields the requests that it waits for and receives their statuses, or it
# yields a function that returns whether to continue. Its local variables keep all buffers alive.
Steps = Generator[list[MPI.Request] | Callable[[], bool], list[MPI.Status], None]

YIELDS = 100  # tests that are followed by yielding the core, before the first sleep
SLEEPS_S = 20e-6, 2e-3  # shortest and longest sleep


class ProgressEngine:
    """The operations of this process in progress. A wait for one operation advances all of them.

    An operation may take several rounds of messages. If rank 0 waits for one message while rank 1 waits for rank 0's
    next round of an earlier operation, and each advanced only its own operation, there would be a deadlock.

    Args:
        spins: number of tests before a wait yields the core. With one core per rank, spinning reduces the latency; with
            fewer cores, every test takes time from the rank that is to send the message.
    """

    def __init__(self, spins: int) -> None:
        self._spins = spins
        self.waited_s = 0.0  # sum of all waits, in which other operations may have been advanced
        self._active: set[Operation] = set()
        # torch 2.6 keeps only the C++ part of an operation alive that DDP or a functional collective waits for
        self._recent: deque[Operation] = deque(maxlen=64 if torch.__version__ < "2.7" else 0)
        self._with_future: queue.SimpleQueue[Operation] = queue.SimpleQueue()
        self._future_thread: threading.Thread | None = None

    def started(self, operation: "Operation") -> None:
        self._active.add(operation)
        self._recent.append(operation)

    def finished(self, operation: "Operation") -> None:
        self._active.discard(operation)

    def wait(self, operation: "Operation", deadline: float) -> bool:
        """Wait until the operation has ended or ``deadline`` (``time.monotonic()``). Return whether it has ended."""
        tests = 0
        began = now = time.monotonic()
        while not operation.advance() and now <= deadline:
            tests += 1
            if tests > self._spins:
                now = time.monotonic()
                for other in tuple(self._active):
                    other.advance()
                pause(tests - self._spins, now - began)
        self.waited_s += time.monotonic() - began
        return operation.advance()

    def advance_in_thread(self, operation: "Operation") -> None:
        """Advance the operation in a thread, because waiting for its future does not make progress in MPI."""
        operation.entry.deadline = time.monotonic() + operation.timeout_s
        operation.entry.__enter__()  # the caller is assumed to wait for the future
        self._with_future.put(operation)
        if self._future_thread is None:
            self._future_thread = threading.Thread(target=self._complete_futures, name="mpi-progress", daemon=True)
            self._future_thread.start()

    def _complete_futures(self) -> None:
        """Advance the operations with a future until they end, in any order."""
        operations: list[Operation] = []
        while True:
            while not operations or not self._with_future.empty():
                operations.append(self._with_future.get())
                began, tests = time.monotonic(), 0
            now = time.monotonic()
            done = [operation for operation in operations if operation.advance() or now > operation.entry.deadline]
            for operation in done:
                operations.remove(operation)
                operation.entry.__exit__()
                # in a separate thread: a callback may wait for the next future, as PowerSGD's does
                threading.Thread(target=operation.complete_future, daemon=True).start()
            tests += 1
            pause(tests, time.monotonic() - began)


def pause(times: int, waited_s: float) -> None:
    """Yield the core at first; after ``YIELDS`` tests, sleep for a twentieth of the time waited so far."""
    if times <= YIELDS:
        os.sched_yield()
    else:
        shortest, longest = SLEEPS_S
        time.sleep(min(longest, max(shortest, waited_s / 20)))


class Operation(Work):
    """``torch.distributed.Work`` of one operation, which starts on construction.

    Args:
        entry: record of the operation in the trace.
        progress: engine that advances it.
        steps: its steps.
        inputs: input tensors, for the profiler.
        outputs: output tensors, the result of the future.
        timeout_s: limit in seconds of ``wait()`` and of the future.

    Raises:
        Exception: the error of the steps, if they fail before any message is sent.
    """

    # class attributes as defaults, because few operations set them
    _error: BaseException | None = None
    _finished = False
    _received: Sequence[MPI.Status] = ()  # of the last completed requests
    _future: torch.futures.Future[Any] | None = None
    _record = None

    def __init__(
        self,
        entry: Entry,
        progress: ProgressEngine,
        steps: Steps,
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
        timeout_s: float,
    ) -> None:
        super().__init__()
        self._progress = progress
        self.entry = entry
        self._steps = steps
        self._outputs = outputs
        self.timeout_s = timeout_s
        self._awaited: list[MPI.Request] | Callable[[], bool] = []
        self._statuses: list[MPI.Status] = []  # of the requests in that list that have completed
        self._advancing = threading.Lock()
        if torch.autograd._profiler_enabled():
            self._record = torch._C._profiler._RecordFunctionFast(f"mpi:{entry.operation}", inputs or outputs)
            self._record.__enter__()
        progress.started(self)
        self.advance()
        if self._error is not None and not self._awaited:  # nothing was sent: the arguments are invalid
            raise self._error

    def advance(self) -> bool:
        """Advance as far as possible without waiting. Return whether the operation has ended, even with an error."""
        if self._finished or not self._advancing.acquire(blocking=False):
            return self._finished
        try:
            while self._may_continue():
                statuses = self._statuses
                self._received = statuses or self._received
                self._statuses = []
                self._awaited = self._steps.send(statuses or None)  # type: ignore[arg-type]
        except StopIteration:
            self._close()
        except Exception as error:
            self._error = error
            self._close()
        finally:
            self._advancing.release()
        return self._finished

    def _may_continue(self) -> bool:
        awaited = self._awaited
        if callable(awaited):
            return awaited()
        for request in awaited[len(self._statuses) :]:
            status = MPI.Status()
            if not request.Test(status):  # Testall is twice as expensive
                return False
            self._statuses.append(status)
        return True

    def _close(self) -> None:
        self._finished = True
        self._progress.finished(self)
        self.entry.end(self._error)
        if self._record is not None:
            self._record.__exit__(None, None, None)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait until the outputs are complete.

        Args:
            timeout: limit of the wait; 0 for the timeout of the group.

        Raises:
            RuntimeError: if the operation failed or did not end in time.
        """
        limit_s = timeout.total_seconds() or self.timeout_s
        if not self.finished_by(time.monotonic() + limit_s):
            raise RuntimeError(f"{self.entry.operation}: Timed out after {limit_s:g} s")
        if self._error is not None:
            raise RuntimeError(f"{self.entry.operation} failed: {self._error}") from self._error
        return True

    def finished_by(self, deadline: float) -> bool:
        """Wait until the operation has ended or ``deadline`` (``time.monotonic()``). Return whether it has ended."""
        if self.advance():
            return True
        self.entry.deadline = deadline
        with self.entry:
            return self._progress.wait(self, deadline)

    def is_completed(self) -> bool:
        return self.advance()

    def is_success(self) -> bool:
        return self.advance() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> list[torch.Tensor]:
        return self._outputs

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        """Return the sender of a received message, relative to the group; -1 if there is none."""
        return self._received[0].Get_source() if self._received else -1

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[Any]:
        """Return a future of the outputs."""
        if self._future is None:
            self._future = torch.futures.Future()
            if self.advance():
                self.complete_future()
            else:
                self.entry.awaited()
                self._progress.advance_in_thread(self)
        return self._future

    def complete_future(self) -> None:
        """Set the future's result or exception. The operation has ended or exceeded its time limit."""
        assert self._future is not None
        if not self._finished:
            self._future.set_exception(RuntimeError(f"{self.entry.operation}: Timed out after {self.timeout_s:g} s"))
        elif self._error is None:
            self._future.set_result(self._outputs)
        else:
            self._future.set_exception(self._error)
