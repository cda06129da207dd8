"""No silent hang: a thread per rank that notices when nothing moves, and answers when another rank asks what it does.

The rank that notices asks all others for their trace. The lowest that answers writes all traces to a folder, prints one
report and, unless it was only asked for, ends the job. The thread sleeps nearly always; a rank that computes, waits or
sits in a blocking MPI call answers within ``POLL_S``, one that is stopped or dead does not, and the report says so.
"""

import json
import math
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from mpi4py import MPI

from pipeline.mpi.failure import abort
from pipeline.mpi.hang_report import HangReport, Snapshot
from pipeline.mpi.trace import LAST, GroupTrace, Trace

POLL_S = 0.25  # a thread that wakes four times a second costs nothing that can be measured
ANSWER_S = 2.5  # how long an answer is waited for
DEATH_S = 1.0  # between a rank's death and the report: time for the others to leave, too, if that is what they do
RELAY_S = 7.0  # a rank that handed its report on and still lives ends the job by itself
QUIET_S = 2.0  # a signal sent to all ranks is one request

ASK, ANSWER, REPORT = 1, 2, 3  # tags


class Watch:
    """One rank's watch. ``timeout_s``: how long an operation may be waited for before the job is ended."""

    def __init__(self, comm: MPI.Intracomm, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._trace = Trace()
        self._comm = comm.Dup()  # of its own: nothing else can be in the way
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._answers: dict[int, Snapshot] = {}
        self._under_way: list[tuple[MPI.Request, bytes]] = []
        self._messages, self._gathering = threading.RLock(), threading.Lock()
        self._requests: list[tuple[str, bool]] = []  # (reason, end the job?)
        self._reported_at = float("-inf")
        self._stopped = False
        self._gone: dict[int, float] = {}  # rank → when it was noticed
        self._pids = _processes_here(self._comm)
        self._wake_up, self._alarm = os.pipe()
        os.set_blocking(self._alarm, False)
        self._thread = threading.Thread(target=self._run, name="mpi-watch", daemon=True)

    def start(self) -> None:
        """From now on this rank answers, and SIGUSR1 or SIGUSR2 asks for a report, unless the program takes them."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                if signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, self._on_signal)
        self._thread.start()

    def stop(self) -> None:
        """No more messages from this rank."""
        self._stopped = True
        os.write(self._alarm, b"!")
        self._thread.join()

    def group(self, ranks: list[int]) -> GroupTrace:
        """The trace of a new group of these global ranks."""
        return GroupTrace(self._trace, ranks)

    def after_failure(self) -> str:
        """For the rank whose failure ends the job: what does not match between ranks and who waits, or nothing."""
        snapshots = self._gather(enough=range(self._size))
        snapshots[self._rank]["now"] = "the failure above"
        report = HangReport(snapshots, {})
        lines = report.mismatches + report.waits
        return self._publish("the other ranks meanwhile", lines, snapshots) + "\n" if lines else ""

    # The thread

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake_up, select.POLLIN)
        ranks = self._handles()
        for handle in ranks:
            poller.register(handle, select.POLLIN)
        before = time.monotonic()
        while not self._stopped:
            for descriptor, _ in poller.poll(POLL_S * 1000):
                if descriptor == self._wake_up:
                    os.read(self._wake_up, 4096)
                else:
                    poller.unregister(descriptor)
                    self._gone[ranks[descriptor]] = time.monotonic()
            self._receive()
            now = time.monotonic()
            self._look(now, min(now - before, 2 * POLL_S))  # a stopped process has not waited meanwhile
            before = now

    def _handles(self) -> dict[int, int]:
        """File descriptors that become readable when the process of a rank on this machine ends."""
        try:
            return {os.pidfd_open(pid): rank for rank, pid in self._pids.items() if rank != self._rank}
        except (AttributeError, OSError):  # an old kernel or Python, a sandbox: then a death shows at the timeout
            return {}

    def _look(self, now: float, elapsed: float) -> None:
        """Is there something to report?"""
        while self._requests:
            self._report(*self._requests.pop())
        for rank, at in self._gone.items():
            if now - at > DEATH_S:
                self._report(f"rank {rank} (process {self._pids[rank]}) died without a word; the job ends", end=True)
        for entry in self._trace.waiting.copy():
            entry.waited_s += elapsed
            if entry.waited_s > self.timeout_s and entry.deadline == math.inf:
                self._report(
                    f"rank {self._rank} has waited {entry.waited_s:.0f} s in {entry.operation} and ends the job",
                    end=True,
                )

    def _report(self, reason: str, end: bool) -> None:
        """Have the lowest rank that answers report, which may be this one; then end the job, if so asked."""
        if not end and time.monotonic() - self._reported_at < QUIET_S:
            return
        self._reported_at = time.monotonic()
        snapshots = self._gather(enough=range(1))
        first = min(snapshots)
        if first != self._rank:
            self._send(json.dumps([reason, end]).encode(), first, REPORT)
            if end:
                self._await_the_end()
                print(f"pipeline: {reason}; rank {first} did not report in time", file=sys.stderr, flush=True)
        else:
            snapshots = self._gather(enough=range(self._size))
            report = HangReport(
                snapshots, {rank: self._why(rank) for rank in range(self._size) if rank not in snapshots}
            )
            print(self._publish(reason, report.text(), snapshots), file=sys.stderr, flush=True)
        if end:
            abort(1)

    def _await_the_end(self) -> None:
        """Answer what the reporting rank asks, which then ends the job; return if it has not."""
        deadline = time.monotonic() + RELAY_S
        while time.monotonic() < deadline:
            self._receive()
            time.sleep(0.01)

    def _publish(self, reason: str, lines: list[str], snapshots: dict[int, Snapshot]) -> str:
        """Write report and traces to a new folder; returns the report, and where the traces are."""
        text = "\n  ".join([f"pipeline: {reason}", *lines])
        folder = Path(os.environ.get("FIRA_HANG_DIR", "fira-hang"), time.strftime("%Y%m%d-%H%M%S-") + str(os.getpid()))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for rank, snapshot in snapshots.items():
                (folder / f"fira-hang-{rank}.json").write_text(json.dumps(snapshot, indent=1))
            (folder / "report.txt").write_text(text + "\n")
        except OSError as error:
            return f"{text}\n  the ranks' last operations could not be written: {error}"
        return f"{text}\n  every rank's last {LAST} operations and stacks: {folder.resolve()}"

    def _why(self, rank: int) -> str:
        """Why a rank does not answer, as far as can be seen from here."""
        if rank not in self._pids:
            return f"nothing from its machine within {ANSWER_S:g} s"
        pid = self._pids[rank]
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            state = "Z"
        if state == "T":
            return f"its process {pid} is stopped (SIGSTOP)"
        if state in "XZ":
            return f"its process {pid} is dead"
        return f"its process {pid} runs, but in C code that holds Python's lock, or not fast enough"

    # Messages

    def _gather(self, enough: range) -> dict[int, Snapshot]:
        """The traces of all ranks that answer, this one's included; those of ``enough`` are waited for."""
        with self._gathering:
            self._answers = {self._rank: self._trace.as_json()}
            for peer in range(self._size):
                if peer != self._rank:
                    self._send(b"", peer, ASK)
            deadline = time.monotonic() + ANSWER_S
            while time.monotonic() < deadline and not all(rank in self._answers for rank in enough):
                self._receive()
                time.sleep(0.002)
            return self._answers.copy()

    def _receive(self) -> None:
        """Answer, or take down, what other ranks have sent."""
        status = MPI.Status()
        with self._messages:
            self._under_way = [(request, data) for request, data in self._under_way if not request.Test()]
            while message := self._comm.Improbe(status=status):
                source, tag = status.Get_source(), status.Get_tag()
                data = bytearray(status.Get_count(MPI.BYTE))
                message.Recv([data, MPI.BYTE])
                if tag == ASK:
                    self._send(json.dumps(self._trace.as_json()).encode(), source, ANSWER)
                elif tag == ANSWER:
                    self._answers[source] = json.loads(data)
                else:
                    reason, end = json.loads(data)
                    self._requests.append((reason, end))

    def _send(self, data: bytes, peer: int, tag: int) -> None:
        with self._messages:
            self._under_way.append((self._comm.Isend([data, MPI.BYTE], peer, tag), data))  # data lives until it is sent

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requests.append((f"asked for by {signal.Signals(number).name}", False))
        os.write(self._alarm, b"!")


def _processes_here(comm: MPI.Intracomm) -> dict[int, int]:
    """The process ids of the ranks on this machine, by rank: those of this boot and this space of process ids."""
    try:
        space = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux, or a sandbox: nobody is known to be here
        space = f"rank {comm.Get_rank()}"
    everyone = comm.allgather((space, os.getpid()))
    return {rank: pid for rank, (there, pid) in enumerate(everyone) if there == space}
