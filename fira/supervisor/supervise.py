"""The supervisor of a training run: starts a job, observes it, and starts the next one until the run has ended.

wait for ranks ─→ start ─→ observe ─→ the job has ended ─→ decide ─→ end
      ↑                       └─→ the hosts have changed: save and stop ─┤
      └───────────────────────────────── restart ────────────────────────┘
"""

import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fira.errors import UserError
from fira.metrics.events import EventLog
from fira.supervisor.decision import End, Ended, Restart, decide
from fira.supervisor.elastic_layouts import elastic, threads_per_rank
from fira.supervisor.exit_cause import ExitCause, find_cause
from fira.supervisor.hosts import Slots, lost, place, read_hosts
from fira.supervisor.job import Job, launch_command, launcher_words
from fira.supervisor.run_state import RunState, read_state
from fira.supervisor.stop_request import StopRequest
from fira.training.config import SUPERVISED, TrainConfig
from fira.training.flags import given_flags

MAX_RESTARTS = 3  # default limit of successive restarts without progress
POLL_S = 0.2
HOSTS_S = 2.0  # between two readings of --hosts
SAVE_S = 60.0  # limit for the checkpoint before a job is stopped
RESEND_S = 2.0  # a rank that has not begun its first step may ignore the request for a checkpoint

THREADS = "OMP_NUM_THREADS"  # the same in all jobs, because results depend on it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a job. placement: ranks by host; None without --hosts."""

    count: int
    placement: Slots | None

    @property
    def text(self) -> str:
        return f"{self.count} rank{'s' if self.count > 1 else ''}"


class Supervisor:
    """Supervises one run.

    program: the words that start the training program, such as python scripts/train.py. flags: its flags that are not
    settings. Raises UserError for settings with which no job can be started.
    """

    def __init__(self, config: TrainConfig, program: Sequence[str], flags: Sequence[str]) -> None:
        if config.out is None:
            raise UserError("--elastic and --max-restarts need --out, the run folder, such as --out runs/a")
        self._stop = StopRequest()
        self._config, self._out = config, Path(config.out)
        self._elastic = elastic(config)
        self._slots = read_hosts(config.hosts) if config.hosts else None
        self._launcher = launcher_words(config.launcher)
        fixed = ["--micro-batch-size", str(self._elastic.microbatch), *flags]
        own = given_flags(config, without=(*SUPERVISED, "micro_batch_size", "resume"))
        self._program = [*program, *own, *fixed]
        threads = os.environ.get(THREADS) or threads_per_rank(self._elastic.most, self._slots)
        self._variables = {THREADS: str(threads)}
        self._limit = MAX_RESTARTS if config.max_restarts is None else config.max_restarts
        self._events = EventLog(self._out)
        self._first = read_state(self._out)

    def run(self) -> int:
        """Run until the last step, a signal or a failure that restarts do not solve. Return the exit status."""
        restarts = 0
        while ranks := self._wait_for_ranks():
            before = read_state(self._out)
            ended, cause = self._run_job(ranks, before, restarts)
            if self._stop.number is not None and not ended.finished:
                break
            following = decide(ended, restarts, self._limit)
            if not ended.finished:
                self._report_exit(ranks, ended, cause, following)
            if isinstance(following, End):
                state = read_state(self._out)
                level = logging.WARNING if following.status else logging.INFO
                self._events.report("end", following.reason, level, step=state.saved_step, status=following.status)
                return following.status
            restarts = following.without_progress
            self._stop.wait(following.delay_s)
        return self._end_by_signal()

    def _wait_for_ranks(self) -> Ranks | None:
        """Wait until there are slots for the smallest number of ranks. Return None if the run is to end."""
        waiting = False
        while self._stop.number is None:
            slots = self._read_slots()
            available = self._elastic.most if slots is None else sum(slots.values())
            if count := self._elastic.usable(available):
                return Ranks(count, place(slots, count) if slots else None)
            if not waiting:
                needed = min(self._elastic.layouts)
                self._events.report(
                    "wait", f"{available} slots, {needed} are needed; waiting for more", slots=available
                )
                waiting = True
            self._stop.wait(HOSTS_S)
        return None

    def _read_slots(self) -> Slots | None:
        """The slots of --hosts, or the last known ones if they cannot be read now; None without --hosts."""
        if self._config.hosts:
            try:
                self._slots = read_hosts(self._config.hosts)
            except UserError as error:
                logger.warning("%s; using the hosts that were read before", error)
        return self._slots

    def _run_job(self, ranks: Ranks, before: RunState, restarts: int) -> tuple[Ended, ExitCause]:
        """Start a job and wait for its end, or stop it if the run is to end or to use other ranks."""
        layout, step = self._layout(ranks), self._resumed_step(before)
        job = Job(launch_command(self._launcher, ranks.count, ranks.placement, self._command(before)), self._variables)
        try:
            self._events.report(
                "start",
                f"{ranks.text}, {layout}, from {'the given checkpoint' if step is None else f'step {step}'}",
                step=step,
                ranks=ranks.count,
                layout=layout,
                hosts=ranks.placement,
                job=job.name,
                restarts_without_progress=restarts,
            )
            status = self._observe(job, ranks, before)
        finally:
            job.stop()
        after = read_state(self._out)
        cause = find_cause(status or 0, job.output())
        return Ended(
            status=status or 0,
            rank=cause.rank,
            signal=cause.signal,
            finished=after.finished not in (0, before.finished),
            saved=after.saved != before.saved,
            requested=status is None,
        ), cause

    def _observe(self, job: Job, ranks: Ranks, before: RunState) -> int | None:
        """Wait for the end of a job. Return its exit status, or None if it is to be stopped."""
        read_at = time.monotonic()
        while (status := job.wait(POLL_S)) is None:
            if self._stop.checkpoint and read_state(self._out).log != before.log:  # a job that starts might be ended
                self._stop.checkpoint = False
                job.request_checkpoint()
            reason = None
            if self._stop.number is not None:
                reason = f"{signal.Signals(self._stop.number).name} received"
            elif self._config.hosts and time.monotonic() - read_at > HOSTS_S:
                reason = self._why_resize(ranks, before)
                read_at = time.monotonic()
            if reason:
                self._events.report("stop", reason, step=read_state(self._out).logged_step, cause=reason)
                return self._save(job, before)
        return status

    def _why_resize(self, ranks: Ranks, before: RunState) -> str | None:
        """The reason to continue on other ranks. More ranks are used after a checkpoint, fewer at once."""
        slots = self._read_slots() or {}
        if gone := lost(ranks.placement or {}, slots):
            return f"--hosts has lost {', '.join(gone)}"
        count = self._elastic.usable(sum(slots.values())) or 0
        if count > ranks.count and read_state(self._out).saved != before.saved:
            return f"{count} instead of {ranks.count} ranks are possible"
        return None

    def _save(self, job: Job, before: RunState) -> int | None:
        """Let a job that is training save a checkpoint, unless SIGINT has been received.

        Return the exit status of a job that ends by itself, as after the loss of a host, else None.
        """
        state = read_state(self._out)
        started = time.monotonic()
        resend_at = started
        while (
            state.log != before.log
            and read_state(self._out).saved == state.saved
            and not self._stop.immediate
            and time.monotonic() - started < SAVE_S
        ):
            if time.monotonic() >= resend_at:
                job.request_checkpoint()
                resend_at += RESEND_S
            if (status := job.wait(POLL_S)) is not None:
                return status
        return job.wait(0.0)

    def _report_exit(self, ranks: Ranks, ended: Ended, cause: ExitCause, following: Restart | End) -> None:
        """Write the event of a job that has ended before the last step."""
        if ended.requested:
            return
        step = read_state(self._out).logged_step
        message = f"{cause.text}; {ranks.text}, after step {step}"
        if isinstance(following, Restart):
            message += f"; restart {following.without_progress} of {self._limit} without a newer checkpoint"
            message += f", in {following.delay_s:.0f} s" if following.delay_s else ""
        self._events.report(
            "exit",
            message,
            logging.WARNING,
            step=step,
            ranks=ranks.count,
            layout=self._layout(ranks),
            cause=cause.text,
            rank=cause.rank,
            signal=cause.signal,
            status=ended.status,
        )

    def _end_by_signal(self) -> int:
        """The exit status after a signal: 130 for SIGINT; 0 for SIGTERM, as of a training run."""
        step = read_state(self._out).saved_step
        name = signal.Signals(self._stop.number or signal.SIGTERM).name
        self._events.report("end", f"{name}: ended at the checkpoint of step {step}", step=step, cause=name)
        return 128 + signal.SIGINT if self._stop.immediate else 0

    def _layout(self, ranks: Ranks) -> str:
        return "chosen by --plan auto" if self._config.plan == "auto" else str(self._elastic.layouts[ranks.count])

    def _command(self, before: RunState) -> list[str]:
        resume = self._resume(before)
        return [*self._program, *(["--resume", resume] if resume else [])]

    def _resume(self, before: RunState) -> str | None:
        """`auto` as soon as this supervisor's jobs have written something to resume from, else what the user gave."""
        written = before.log if self._config.resume is None else before.saved
        first = self._first.log if self._config.resume is None else self._first.saved
        return "auto" if written != first else self._config.resume

    def _resumed_step(self, before: RunState) -> int | None:
        """The step of the checkpoint from which a job continues; None if it is one that the user gave."""
        resume = self._resume(before)
        return before.saved_step if resume == "auto" else None if resume else 0
