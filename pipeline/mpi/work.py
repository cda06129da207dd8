"""An operation under way: MPI requests, what is left to do after them, and how to wait for both."""

import os
import threading
import time
from collections.abc import Generator
from datetime import timedelta

import torch
from mpi4py import MPI
from torch.distributed import Work

from pipeline.mpi.trace import Entry

# An operation is a generator. It yields the requests it waits for, is sent their statuses, and finishes its outputs
# after the last one. Its local variables keep every buffer alive until then.
Steps = Generator[list[MPI.Request], list[MPI.Status], None]

SPINS = 200  # tests before the first yield: a lone message is there within microseconds
YIELDS = 200  # tests, each followed by a yield to another rank on this core, before the first sleep
SLEEP_S = 50e-6


class Operation(Work):
    """The ``torch.distributed.Work`` of one operation. It starts when it is made."""

    def __init__(
        self, entry: Entry, steps: Steps, inputs: list[torch.Tensor], outputs: list[torch.Tensor], timeout_s: float
    ) -> None:
        super().__init__()
        self.name = name = entry.operation
        self._entry = entry
        self._steps = steps
        self._outputs = outputs
        self._timeout_s = timeout_s
        self._requests: list[MPI.Request] = []
        self._statuses: list[MPI.Status] = []
        self._source = -1
        self._error: BaseException | None = None
        self._finished = False
        self._advancing = threading.Lock()
        self._future: torch.futures.Future | None = None
        self._record = None
        if torch.autograd._profiler_enabled():
            self._record = torch._C._profiler._RecordFunctionFast(f"mpi:{name}", inputs)
            self._record.__enter__()
        self._advance()
        if self._error is not None:
            raise self._error

    def _advance(self) -> bool:
        """Go as far as possible without waiting. True when the operation is over, well or badly."""
        if self._finished or not self._advancing.acquire(blocking=False):
            return self._finished
        try:
            while not self._finished and MPI.Request.Testall(self._requests, self._statuses):
                self._requests = self._steps.send(self._statuses if self._requests else None)  # type: ignore[arg-type]
                self._statuses = [MPI.Status() for _ in self._requests]
        except StopIteration:
            self._source = self._statuses[0].Get_source() if self._statuses else -1
            self._finished = True
        except Exception as error:
            self._error = error
            self._finished = True
        finally:
            if self._finished:
                self._entry.end(self._error)
            if self._finished and self._record is not None:
                self._record.__exit__(None, None, None)
            self._advancing.release()
        return self._finished

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait until the outputs are there; ``timeout`` 0 means the group's.

        Raises:
            RuntimeError: the operation failed, or did not end in time.
        """
        limit_s = timeout.total_seconds() or self._timeout_s
        if not self.finished_by(time.monotonic() + limit_s):
            raise RuntimeError(f"{self.name}: Timed out after {limit_s:g} s")
        if self._error is not None:
            raise RuntimeError(f"{self.name} failed: {self._error}") from self._error
        return True

    def finished_by(self, deadline: float) -> bool:
        """Wait until the operation is over, but not beyond ``deadline`` (``time.monotonic()``)."""
        if self._advance():
            return True
        tests = 0
        self._entry.deadline = deadline
        with self._entry:
            while not self._advance():
                tests += 1
                if tests > SPINS + YIELDS:
                    time.sleep(SLEEP_S)
                    if time.monotonic() > deadline:
                        return False
                elif tests > SPINS:
                    os.sched_yield()
        return True

    def is_completed(self) -> bool:
        return self._advance()

    def is_success(self) -> bool:
        return self._advance() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> list[torch.Tensor]:
        return self._outputs

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        """The group rank a receive got its message from."""
        return self._source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future:
        """A future of the outputs. Whoever waits for it does not drive MPI, so a thread does."""
        if self._future is None:
            self._future = torch.futures.Future()
            if self._advance():
                self._complete(self._future)
            else:
                threading.Thread(target=self._complete, args=(self._future,), daemon=True).start()
        return self._future

    def _complete(self, future: torch.futures.Future) -> None:
        try:
            self.wait()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(self._outputs)
