"""An operation under way: MPI requests, what is left to do after them, and how to wait for both."""

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta

import torch
from mpi4py import MPI
from torch.distributed import Work

from pipeline.mpi.trace import Entry

# An operation is a generator. It yields the requests it waits for and is sent their statuses, or yields a function that
# says whether to go on; after the last one it finishes its outputs. Its local variables keep every buffer alive.
Steps = Generator[list[MPI.Request] | Callable[[], bool], list[MPI.Status], None]

YIELDS = 100  # tests, each followed by a yield to another rank on this core, before the first sleep
SLEEPS_S = 20e-6, 2e-3  # the shortest and the longest sleep


class ProgressEngine:
    """The operations of this process that are under way: whoever waits for one moves all.

    Some operations take several rounds of messages. Rank 0 may wait for another message while rank 1 waits for rank
    0's next round of an earlier operation; if each moved only its own, both would wait for ever.

    Args:
        spins: how often a wait looks for its message before it gives the core away. With a core per rank, long enough
            to catch a message that is coming; with fewer cores each look takes time from the rank that is to send it.
    """

    def __init__(self, spins: int) -> None:
        self._spins = spins
        self._under_way: set[Operation] = set()
        # torch 2.6 keeps but the C++ half of an operation that DDP or a functional collective waits for
        self._kept: deque[Operation] = deque(maxlen=64 if torch.__version__ < "2.7" else 0)
        self._promised: queue.SimpleQueue[Operation] = queue.SimpleQueue()
        self._keeper: threading.Thread | None = None

    def started(self, operation: "Operation") -> None:
        self._under_way.add(operation)
        self._kept.append(operation)

    def finished(self, operation: "Operation") -> None:
        self._under_way.discard(operation)

    def wait(self, operation: "Operation", deadline: float) -> bool:
        """Wait until the operation is over, but not beyond ``deadline`` (``time.monotonic()``). True if it is."""
        tests = 0
        began = time.monotonic()
        while not operation.advance():
            tests += 1
            if tests > self._spins:
                now = time.monotonic()
                if now > deadline:
                    return False
                for other in tuple(self._under_way):
                    other.advance()
                pause(tests - self._spins, now - began)
        return True

    def promise(self, operation: "Operation") -> None:
        """See to it that the operation's future is completed, though whoever waits for that does not drive MPI."""
        operation.entry.deadline = time.monotonic() + operation.timeout_s
        operation.entry.__enter__()  # somebody waits, as far as we can know
        self._promised.put(operation)
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, name="mpi-progress", daemon=True)
            self._keeper.start()

    def _keep(self) -> None:
        """Drive the promised operations, in whatever order they end."""
        operations: list[Operation] = []
        while True:
            while not operations or not self._promised.empty():
                operations.append(self._promised.get())
                began, tests = time.monotonic(), 0
            now = time.monotonic()
            done = [operation for operation in operations if operation.advance() or now > operation.entry.deadline]
            for operation in done:
                operations.remove(operation)
                operation.entry.__exit__()
                # in a thread of its own: what hangs on the future may wait for the next one (PowerSGD does)
                threading.Thread(target=operation.complete_future, daemon=True).start()
            tests += 1
            pause(tests, time.monotonic() - began)


def pause(times: int, waited_s: float) -> None:
    """Give the core away: first to whoever is ready to run, then for a twentieth of the time waited so far."""
    if times <= YIELDS:
        os.sched_yield()
    else:
        shortest, longest = SLEEPS_S
        time.sleep(min(longest, max(shortest, waited_s / 20)))


class Operation(Work):
    """The ``torch.distributed.Work`` of one operation. It starts when it is made."""

    # what few operations ever set, so that the others need not
    _error: BaseException | None = None
    _finished = False
    _received: Sequence[MPI.Status] = ()  # the last ones there were
    _future: torch.futures.Future | None = None
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
        self._statuses: list[MPI.Status] = []  # of the first requests in that list
        self._advancing = threading.Lock()
        if torch.autograd._profiler_enabled():
            self._record = torch._C._profiler._RecordFunctionFast(f"mpi:{entry.operation}", inputs or outputs)
            self._record.__enter__()
        progress.started(self)
        self.advance()
        if self._error is not None and not self._awaited:  # nothing was sent: the call itself was wrong
            raise self._error

    def advance(self) -> bool:
        """Go as far as possible without waiting. True when the operation is over, well or badly."""
        if self._finished or not self._advancing.acquire(blocking=False):
            return self._finished
        try:
            while self._may_go_on():
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

    def _may_go_on(self) -> bool:
        awaited = self._awaited
        if callable(awaited):
            return awaited()
        for request in awaited[len(self._statuses) :]:
            status = MPI.Status()
            if not request.Test(status):  # (Testall costs twice as much)
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
        """Wait until the outputs are there; ``timeout`` 0 means the group's.

        Raises:
            RuntimeError: the operation failed, or did not end in time.
        """
        limit_s = timeout.total_seconds() or self.timeout_s
        if not self.finished_by(time.monotonic() + limit_s):
            raise RuntimeError(f"{self.entry.operation}: Timed out after {limit_s:g} s")
        if self._error is not None:
            raise RuntimeError(f"{self.entry.operation} failed: {self._error}") from self._error
        return True

    def finished_by(self, deadline: float) -> bool:
        """Wait until the operation is over, but not beyond ``deadline`` (``time.monotonic()``)."""
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
        """The group rank a receive got its message from."""
        return self._received[0].Get_source() if self._received else -1

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future:
        """A future of the outputs."""
        if self._future is None:
            self._future = torch.futures.Future()
            if self.advance():
                self.complete_future()
            else:
                self.entry.awaited()
                self._progress.promise(self)
        return self._future

    def complete_future(self) -> None:
        """Hand the outputs, or the error, to those who wait for the future. The operation is over, or took too long."""
        assert self._future is not None
        if not self._finished:
            self._future.set_exception(RuntimeError(f"{self.entry.operation}: Timed out after {self.timeout_s:g} s"))
        elif self._error is None:
            self._future.set_result(self._outputs)
        else:
            self._future.set_exception(self._error)
