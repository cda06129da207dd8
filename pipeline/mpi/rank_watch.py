"""Hang detection: one thread per rank that ends a stalled job with a report instead of letting it wait forever.

A rank whose operation exceeds the timeout asks all other ranks for their traces. The responding rank with the lowest
number writes all traces to a folder, prints one report and, unless a signal requested the report, ends the job. The
thread sleeps most of the time. A rank that computes, waits or blocks in an MPI call answers within ``POLL_S``. A
stopped or dead process does not answer, and the report states this.

The job also ends if a rank waits for a rank that has already left its script and never began the operation.
"""

import json
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

from mpi4py import MPI

from pipeline.mpi.failure import abort
from pipeline.mpi.hang_report import EXIT, HangReport, Snapshot
from pipeline.mpi.processes import Processes
from pipeline.mpi.trace import LAST, Entry, GroupTrace, Trace

POLL_S = 0.25  # a thread that wakes four times per second has no measurable cost
ANSWER_S = 2.5  # limit for the answers of the other ranks
DEATH_S = 1.0  # delay from a rank's death to the report; the other ranks may be about to exit as well
LEFT_S = 2.0  # an operation may wait this long for a rank that has left its script
RELAY_S = 7.0  # after this time, a rank that passed its report on to another rank ends the job itself
LEAST_USE = 0.04  # fraction of a core that a rank in a long activity uses; its idle threads use less than 0.02
QUIET_S = 2.0  # a signal sent to all ranks counts as one request

ASK, ANSWER, REPORT, LEFT = 1, 2, 3, 4  # message tags


class Watch:
    """The watch of one rank.

    Args:
        comm: a communicator of all ranks.
        timeout_s: longest time in seconds that an operation may be waited for before the job is ended.
    """

    def __init__(self, comm: MPI.Intracomm, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._trace = Trace()
        self._comm = comm.Dup()  # a private communicator: no other message can interfere
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._answers: dict[int, Snapshot] = {}
        self._pending: list[tuple[MPI.Request, bytes]] = []
        self._messages, self._gathering = threading.RLock(), threading.Lock()
        self._requests: list[tuple[str, int]] = []  # (reason, exit status; 0: the job continues)
        self._reported_at = float("-inf")
        self._stopped = False
        self._dead: dict[int, float] = {}  # rank → when its death was detected
        self._left: dict[int, tuple[int, str]] = {}  # rank → exit status and activity with which it left its script
        self._checked_left_at = float("-inf")
        self._processes = Processes(self._comm)
        self._cpu_s: dict[int, float] = {}  # rank → CPU time when its long activity was last looked at
        self._wake_up, self._alarm = os.pipe()
        os.set_blocking(self._alarm, False)
        self._thread = threading.Thread(target=self._run, name="mpi-watch", daemon=True)

    def start(self) -> None:
        """Start the thread. SIGUSR1 and SIGUSR2 request a report from now on, unless the program handles them."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                if signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, self._on_signal)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread. This rank sends no more messages."""
        self._stopped = True
        os.write(self._alarm, b"!")
        self._thread.join()

    def group(self, ranks: list[int]) -> GroupTrace:
        """Return the trace of a new group of these global ranks."""
        return GroupTrace(self._trace, ranks)

    def checksum(self) -> int:
        """See ``Trace.checksum``."""
        return self._trace.checksum(self._rank)

    def begin_exit(self) -> Entry:
        """Record that this rank has left its script and will wait for the other ranks."""
        group = self.group(list(range(self._size)))
        group.name = EXIT
        return group.begin(EXIT, [])

    def announce_exit(self, status: int, activity: str) -> None:
        """Notify the other ranks that this rank has left its script and begins no more operations.

        Args:
            status: exit status.
            activity: in which ``sys.exit`` was called; empty if it was not called in one.
        """
        for peer in range(self._size):
            if peer != self._rank:
                self._send(json.dumps([status, activity]).encode(), peer, LEFT)

    def sees_death(self) -> bool:
        """Return whether another rank of this machine has died, which this rank or its guardian will report."""
        return any(self._processes.is_dead(rank) for rank in range(self._size) if rank != self._rank)

    def after_failure(self, waits: bool) -> str:
        """Return mismatches between the ranks after this rank's failure, or an empty string.

        Args:
            waits: whether to return what the other ranks wait for as well.
        """
        snapshots = self._gather(required=self._alive())
        snapshots[self._rank]["now"] = "the failure above"
        report = HangReport(snapshots, self._silent(snapshots))
        lines = report.mismatches + (report.waits if waits else [])
        return self._publish("state of the other ranks at the failure", lines, snapshots) + "\n" if lines else ""

    # The thread

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake_up, select.POLLIN)
        ranks = self._processes.handles()
        for handle in ranks:
            poller.register(handle, select.POLLIN)
        before = time.monotonic()
        while not self._stopped:
            for descriptor, _ in poller.poll(POLL_S * 1000):
                if descriptor == self._wake_up:
                    os.read(self._wake_up, 4096)
                else:
                    poller.unregister(descriptor)
                    self._dead[ranks[descriptor]] = time.monotonic()
            self._receive()
            now = time.monotonic()
            self._check(now, min(now - before, 2 * POLL_S))  # time in which the process was stopped does not count
            before = now

    def _check(self, now: float, elapsed: float) -> None:
        """Report what was requested, dead ranks, and waits that are too long or can never end."""
        while self._requests:
            self._report(*self._requests.pop())
        for rank, at in self._dead.items():
            if now - at > DEATH_S:
                self._report(*self._processes.death(rank))
        for entry in self._trace.waiting.copy():
            entry.waited_s += elapsed
            if entry.deadline != math.inf:
                continue
            if entry.waited_s > self.timeout_s and self._long_activity():
                entry.waited_s = 0.0
            if entry.waited_s > self.timeout_s and entry in self._trace.waiting:  # it may have ended in the meantime
                reason = f"rank {self._rank} has waited {entry.waited_s:.0f} s in {entry.operation} and ends the job"
                self._report(reason, 1)
            if self._left and entry.waited_s > LEFT_S and now - self._checked_left_at > LEFT_S:
                self._checked_left_at = now
                self._check_left()

    def _long_activity(self) -> bool:
        """Return whether a rank is or was in a long activity and has used the CPU since the last call.

        False if a rank is stopped or dead. A rank that does not answer may be in C code that holds Python's global
        interpreter lock, or the machine may be busy. This rank then examines its process.
        """
        snapshots = self._gather(required=self._alive())
        cpu_s: dict[int, float | None] = {}
        for rank in range(self._size):
            if rank in snapshots:
                recent = snapshots[rank]["since_long_s"] <= self.timeout_s  # the wait may end at this moment
                cpu_s[rank] = snapshots[rank]["cpu_s"] if recent else None
            elif self._processes.is_local(rank) and self._processes.can_answer(rank):
                cpu_s[rank] = self._processes.cpu_s_of_long_activity(rank)
            else:
                return False
        used_s = [now - self._cpu_s.get(rank, 0.0) for rank, now in cpu_s.items() if now is not None]
        self._cpu_s |= {rank: now for rank, now in cpu_s.items() if now is not None}
        return any(used > LEAST_USE * self.timeout_s for used in used_s)

    def _check_left(self) -> None:
        """End the job if this rank waits for a rank that has left its script without beginning the operation."""
        snapshots = self._gather(required=range(self._size))
        report = HangReport(snapshots, self._silent(snapshots))
        for rank in sorted(report.never_began[self._rank] & self._left.keys()):
            status, activity = self._left[rank]
            exited = status or activity
            reason = f"rank {rank} has exited with status {status}" if exited else f"rank {rank} has ended its script"
            during = f" in {activity}" if activity else ""
            self._report(f"{reason}{during} while rank {self._rank} waits for it; the job ends", status or 1)

    def _report(self, reason: str, status: int) -> None:
        """Let the lowest rank that answers print the report, then end the job with ``status`` unless that is 0."""
        if not status and time.monotonic() - self._reported_at < QUIET_S:
            return
        self._reported_at = time.monotonic()
        alive = self._alive()
        snapshots = self._gather(required=alive[:1])
        first = min(snapshots)
        if first != self._rank:
            self._send(json.dumps([reason, status]).encode(), first, REPORT)
            if status:
                self._await_end()
                print(f"pipeline: {reason}; rank {first} did not report in time", file=sys.stderr, flush=True)
        else:
            snapshots = self._gather(required=alive)
            report = HangReport(snapshots, self._silent(snapshots))
            text = self._publish(reason, report.text(), snapshots)
            # Claimed as late as possible: mpirun may kill this process at any moment, then the guardian prints.
            if not all(self._processes.claim(rank) for rank in self._dead):
                text = text.replace(reason, "state of the other ranks", 1)
            print(text, file=sys.stderr, flush=True)
        if status:
            abort(status)

    def _silent(self, snapshots: dict[int, Snapshot]) -> dict[int, str]:
        """Return the ranks that have not answered, with the reasons."""
        return {rank: self._processes.why_silent(rank) for rank in range(self._size) if rank not in snapshots}

    def _await_end(self) -> None:
        """Answer the reporting rank until it ends the job. Return if it has not done so within ``RELAY_S``."""
        deadline = time.monotonic() + RELAY_S
        while time.monotonic() < deadline:
            self._receive()
            time.sleep(0.01)

    def _publish(self, reason: str, lines: list[str], snapshots: dict[int, Snapshot]) -> str:
        """Write report and traces to a new folder. Return the report, which names the folder."""
        text = "\n  ".join([f"pipeline: {reason}", *lines])
        parent = os.environ.get("PIPELINE_MPI_HANG_DIR", "hang-reports")
        folder = Path(parent, time.strftime("%Y%m%d-%H%M%S-") + str(os.getpid()))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for rank, snapshot in snapshots.items():
                (folder / f"rank-{rank}.json").write_text(json.dumps(snapshot, indent=1))
            (folder / "report.txt").write_text(text + "\n")
        except OSError as error:
            return f"{text}\n  the ranks' last operations could not be written: {error}"
        return f"{text}\n  every rank's last {LAST} operations and stacks: {folder.resolve()}"

    def _alive(self) -> list[int]:
        """Return the ranks that can answer, as far as this rank can determine it."""
        return [rank for rank in range(self._size) if rank not in self._dead and self._processes.can_answer(rank)]

    # Messages

    def _gather(self, required: Iterable[int]) -> dict[int, Snapshot]:
        """Return the traces of the ranks that answer and of this one. Wait at most ``ANSWER_S`` for ``required``."""
        with self._gathering:
            self._answers = {self._rank: self._trace.as_json()}
            for peer in range(self._size):
                if peer != self._rank:
                    self._send(b"", peer, ASK)
            deadline = time.monotonic() + ANSWER_S
            while time.monotonic() < deadline and not all(rank in self._answers for rank in required):
                self._receive()
                time.sleep(0.002)
            return self._answers.copy()

    def _receive(self) -> None:
        """Handle the messages that have arrived from other ranks."""
        status = MPI.Status()
        with self._messages:
            self._pending = [(request, data) for request, data in self._pending if not request.Test()]
            while message := self._comm.Improbe(status=status):
                source, tag = status.Get_source(), status.Get_tag()
                data = bytearray(status.Get_count(MPI.BYTE))
                message.Recv([data, MPI.BYTE])
                if tag == ASK:
                    self._send(json.dumps(self._trace.as_json()).encode(), source, ANSWER)
                elif tag == ANSWER:
                    self._answers[source] = json.loads(data)
                elif tag == REPORT:
                    reason, exit_status = json.loads(data)
                    self._requests.append((reason, exit_status))
                else:
                    self._left[source] = json.loads(data)

    def _send(self, data: bytes, peer: int, tag: int) -> None:
        with self._messages:  # the buffer is kept until it has been sent
            self._pending.append((self._comm.Isend([data, MPI.BYTE], peer, tag), data))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requests.append((f"report requested by {signal.Signals(number).name}", 0))
        os.write(self._alarm, b"!")
