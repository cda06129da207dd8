"""Simulate a schedule: validity, deadlocks, the timeline with its bubbles, and peak memory."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.schedule import Action, ActionKind, Schedule, dependencies


class ScheduleError(ValueError):
    """The engine cannot run the schedule; the message names the wrong actions or marks the bad cell of the grid."""


@dataclass(frozen=True)
class Timeline:
    """When each action starts and ends, per rank, in the units of the costs given to `simulate`."""

    spans: tuple[tuple[tuple[Action, float, float], ...], ...]

    @property
    def length(self) -> float:
        return max((end for rank in self.spans for _, _, end in rank), default=0.0)

    @property
    def bubble(self) -> float:
        """Fraction of the ranks' time in which nothing is computed."""
        if self.length == 0:
            return 0.0
        busy = sum(end - start for rank in self.spans for _, start, end in rank)
        return 1 - busy / (self.length * len(self.spans))


def simulate(schedule: Schedule, costs: Mapping[ActionKind, Sequence[float]], transfer: float = 0.0) -> Timeline:
    """Compute the timeline of a schedule in which stage s takes `costs[kind][s]` for an action.

    transfer: time from the end of an action until its result has arrived on another rank (latency plus the tensor's
    size over the bandwidth). It overlaps with computation on both ranks, and is zero between stages of one rank.
    Raises ScheduleError when an action is missing, duplicated, on the wrong rank or out of order, or when the schedule
    deadlocks.
    """
    _check(schedule)
    done: dict[Action, float] = {}
    position = [0] * len(schedule.actions)
    clock = [0.0] * len(schedule.actions)
    spans: list[list[tuple[Action, float, float]]] = [[] for _ in schedule.actions]
    while any(p < len(actions) for p, actions in zip(position, schedule.actions, strict=True)):
        progress = False
        for rank, actions in enumerate(schedule.actions):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                required = dependencies(action, schedule.stages)
                if not all(r in done for r in required):
                    break
                arrivals = (done[r] + (transfer if schedule.placement[r.stage] != rank else 0.0) for r in required)
                start = max([clock[rank], *arrivals])
                done[action] = clock[rank] = start + costs[action.kind][action.stage]
                spans[rank].append((action, start, clock[rank]))
                position[rank] += 1
                progress = True
        if not progress:
            raise ScheduleError("deadlock, every rank waits for another:\n" + format_grid(schedule, position))
    return Timeline(tuple(map(tuple, spans)))


def _check(schedule: Schedule) -> None:
    """Raise ScheduleError unless every rank has its stages' actions, each once and in order of micro-batches."""
    seen = Counter(action for actions in schedule.actions for action in actions)
    kinds = {kind for kind, _, _ in seen} or {ActionKind.FORWARD}
    if kinds & {ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT}:  # then all backwards must be split
        kinds = {ActionKind.FORWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT}
    expected = {Action(k, s, i) for k in kinds for s in range(schedule.stages) for i in range(schedule.microbatches)}
    if set(seen) != expected or any(n > 1 for n in seen.values()):
        wrong = sorted((set(seen) ^ expected) | {a for a, n in seen.items() if n > 1})
        raise ScheduleError(f"missing, unexpected or duplicated actions: {', '.join(map(str, wrong[:8]))}")
    for rank, actions in enumerate(schedule.actions):
        last: dict[tuple[ActionKind, int], int] = {}
        for position, (kind, stage, i) in enumerate(actions):
            if schedule.placement[stage] != rank or i <= last.get((kind, stage), -1):
                marks = [len(a) for a in schedule.actions]
                marks[rank] = position
                raise ScheduleError("wrong rank or order:\n" + format_grid(schedule, marks))
            last[kind, stage] = i


def peak_memory(
    schedule: Schedule, activations: Sequence[int], saved_for_weight_grad: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The peak of what each rank keeps, in the units of the arguments.

    Stage s keeps `activations[s]` from the forward of a micro-batch to the end of its backward, and where the backward
    is split another `saved_for_weight_grad[s]` (default: 0) from BACKWARD_INPUT to BACKWARD_WEIGHT.
    """
    saved = saved_for_weight_grad or [0] * len(activations)
    peaks = []
    for actions in schedule.actions:
        held = peak = 0
        for kind, stage, _ in actions:
            if kind is ActionKind.FORWARD:
                held += activations[stage]
            elif kind is ActionKind.BACKWARD_INPUT:
                held += saved[stage]
            else:
                held -= activations[stage] + (saved[stage] if kind is ActionKind.BACKWARD_WEIGHT else 0)
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)


def earliest_ends(
    placement: Sequence[int], microbatches: int, costs: Mapping[ActionKind, Sequence[float]], transfer: float = 0.0
) -> list[float]:
    """A lower bound, under any schedule, of the time at which each rank ends.

    A rank waits for its first micro-batch and then executes all its actions; the rank of stage 0 also waits for the
    last input gradient. For equal stages the bound is reached by GPipe and 1F1B, (m + p − 1)(F + B), by interleaved
    1F1B and by ZB-2p. It is therefore suitable for sorting layouts before they are simulated.

    costs: as in `simulate`, for split backwards. For a backward that is not split, give its full cost
    as BACKWARD_INPUT and zero as BACKWARD_WEIGHT.
    """
    kinds = (ActionKind.FORWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)
    forward, backward_input, backward_weight = (costs[kind] for kind in kinds)
    ends = [0.0] * (max(placement) + 1)
    last_gradient = 0.0
    for rank in range(len(ends)):
        stages = [s for s, r in enumerate(placement) if r == rank]
        before = range(stages[0])
        transfers = transfer * sum(placement[s] != placement[s + 1] for s in before)
        first_input = transfers + sum(forward[s] for s in before)
        gradient = first_input + microbatches * sum(forward[s] + backward_input[s] for s in stages)
        ends[rank] = gradient + microbatches * sum(backward_weight[s] for s in stages)
        last_gradient = max(last_gradient, gradient + transfers + sum(backward_input[s] for s in before))
    first = placement[0]
    ends[first] = max(ends[first], last_gradient + backward_weight[0])
    return ends


def format_grid(schedule: Schedule, marks: Sequence[int] = ()) -> str:
    """The action lists as text, one row per rank; `marks[r]` is the position of a bad cell in the row of rank r."""
    rows = []
    for rank, actions in enumerate(schedule.actions):
        cells = [str(a) for a in actions]
        if rank < len(marks) and marks[rank] < len(cells):
            cells[marks[rank]] = f"»{cells[marks[rank]]}«"
        rows.append(f"rank {rank}: " + " ".join(cells))
    return "\n".join(rows)
