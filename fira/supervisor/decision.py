"""Decide what follows the end of a job."""

from dataclasses import dataclass

MAX_DELAY_S = 60.0
USER_ERROR = 2  # exit status of commands for invalid input, which a restart cannot correct


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    status: exit status of the launcher; negative if a signal ended it. rank, signal: of the rank that failed
    first, if they are known. finished: the run has reached its last step. saved: the job has published a checkpoint.
    requested: the supervisor ended it, to continue on other ranks.
    """

    status: int
    rank: int | None = None
    signal: int | None = None
    finished: bool = False
    saved: bool = False
    requested: bool = False


@dataclass(frozen=True)
class Restart:
    """Start a job after a delay. without_progress: number of restarts since the last checkpoint, this one included."""

    delay_s: float
    without_progress: int


@dataclass(frozen=True)
class End:
    """End the run with an exit status."""

    status: int
    reason: str


def decide(ended: Ended, without_progress: int, max_restarts: int) -> Restart | End:
    """Decide whether to restart.

    A job has made progress if it has saved a checkpoint. A restart after progress is immediate. Otherwise the delay
    doubles from 1 s up to `MAX_DELAY_S`. The run ends after `max_restarts` successive restarts without progress. A
    status of 0 before the last step is a preemption: the ranks have received SIGTERM and saved a checkpoint.

    without_progress: the number of restarts since the last checkpoint, or since the start of the supervisor.
    """
    if ended.finished:
        return End(0, "the run has reached its last step")
    if ended.requested:
        return Restart(0.0, 0 if ended.saved else without_progress)
    if ended.status == USER_ERROR and ended.rank is None and ended.signal is None:  # MPICH: signal 2 is status 2
        return End(USER_ERROR, "the job ended with status 2, see the message above; a restart would not help")
    restarts = 1 if ended.saved else without_progress + 1
    if restarts > max_restarts:
        return End(1, f"{restarts - 1} restarts without a newer checkpoint, the limit of --max-restarts")
    return Restart(0.0 if ended.saved else min(2.0 ** (restarts - 1), MAX_DELAY_S), restarts)
