"""Run a schedule on paper: is it valid, does it deadlock, how long are the bubbles, how much must be kept."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase, digits

from pipeline.schedule import Action, Kind, Schedule, needs


class ScheduleError(ValueError):
    """The schedule is not one that an engine can run; the message shows the grid with the bad cell marked."""


@dataclass(frozen=True)
class Timeline:
    """When each action starts and ends, per rank, in the units of the costs given to `simulate`."""

    spans: tuple[tuple[tuple[Action, float, float], ...], ...]
    peak_activations: tuple[int, ...]

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


def simulate(schedule: Schedule, costs: Mapping[Kind, Sequence[float]], transfer: float = 0.0) -> Timeline:
    """Play the action lists; `costs[kind][s]` is how long stage s takes for an action.

    transfer: from the end of an action until what it gives has arrived on another rank: latency and the tensor's size
    over the bandwidth. Neither side is kept from computing meanwhile. Between stages of one rank nothing travels.
    Raises ScheduleError when an action is missing, doubled, on the wrong rank, out of order, or waits for ever.
    """
    _check(schedule)
    done: dict[Action, float] = {}
    position = [0] * len(schedule.actions)
    clock = [0.0] * len(schedule.actions)
    spans: list[list[tuple[Action, float, float]]] = [[] for _ in schedule.actions]
    while any(p < len(actions) for p, actions in zip(position, schedule.actions, strict=True)):
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                required = needs(action, schedule.stages)
                if not all(r in done for r in required):
                    break
                arrivals = (done[r] + (transfer if schedule.placement[r.stage] != rank else 0.0) for r in required)
                start = max([clock[rank], *arrivals])
                done[action] = clock[rank] = start + costs[action.kind][action.stage]
                spans[rank].append((action, start, clock[rank]))
                position[rank] += 1
                moved = True
        if not moved:
            raise ScheduleError("every rank waits for another:\n" + grid(schedule, position))
    return Timeline(tuple(map(tuple, spans)), peak_held(schedule, [1] * schedule.stages))


def _check(schedule: Schedule) -> None:
    seen = Counter(action for actions in schedule.actions for action in actions)
    kinds = {kind for kind, _, _ in seen} or {Kind.FORWARD}
    if kinds & {Kind.INPUT, Kind.WEIGHT}:
        kinds |= {Kind.FORWARD, Kind.INPUT, Kind.WEIGHT}  # both halves, and no whole backward beside them
        kinds -= {Kind.BACKWARD}
    expected = {Action(k, s, i) for k in kinds for s in range(schedule.stages) for i in range(schedule.microbatches)}
    if set(seen) != expected or any(n > 1 for n in seen.values()):
        wrong = sorted((set(seen) ^ expected) | {a for a, n in seen.items() if n > 1})
        raise ScheduleError(f"missing, foreign or doubled: {', '.join(map(str, wrong[:8]))}")
    for rank, actions in enumerate(schedule.actions):
        last: dict[tuple[Kind, int], int] = {}
        for position, (kind, stage, i) in enumerate(actions):
            if schedule.placement[stage] != rank or i <= last.get((kind, stage), -1):
                marks = [len(a) for a in schedule.actions]
                marks[rank] = position
                raise ScheduleError("wrong rank or order:\n" + grid(schedule, marks))
            last[kind, stage] = i


def peak_held(schedule: Schedule, sizes: Sequence[int], between: Sequence[int] | None = None) -> tuple[int, ...]:
    """The most that each rank holds at once, where stage s keeps sizes[s] from a forward until its backward is done,
    and beside it between[s] (else nothing) from the first half of a split backward to the second."""
    more = between or [0] * len(sizes)
    peaks = []
    for actions in schedule.actions:
        held = peak = 0
        for kind, stage, _ in actions:
            if kind is Kind.FORWARD:
                held += sizes[stage]
            elif kind is Kind.INPUT:
                held += more[stage]
            else:
                held -= sizes[stage] + (more[stage] if kind is Kind.WEIGHT else 0)
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)


def soonest_ends(
    placement: Sequence[int], microbatches: int, costs: Mapping[Kind, Sequence[float]], transfer: float = 0.0
) -> list[float]:
    """When each rank can have ended at the soonest, whatever the schedule, with the costs of split backwards.

    A rank waits for its first micro-batch, then has its work to do; the rank of stage 0 also waits for the last
    gradient. For equal stages this is the length of 1F1B and GPipe, (m + p − 1)(F + B), of interleaved 1F1B and of
    ZB-2p, so it orders layouts before any is simulated. An unsplit backward is an I of its whole cost and a W of none.
    """
    forward, back, weight = (costs[kind] for kind in (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT))
    ends = [0.0] * (max(placement) + 1)
    last_gradient = 0.0
    for rank in range(len(ends)):
        mine = [s for s, r in enumerate(placement) if r == rank]
        before = range(mine[0])
        way = transfer * sum(placement[s] != placement[s + 1] for s in before)
        lead = way + sum(forward[s] for s in before)
        needed = lead + microbatches * sum(forward[s] + back[s] for s in mine)
        ends[rank] = needed + microbatches * sum(weight[s] for s in mine)
        last_gradient = max(last_gradient, needed + way + sum(back[s] for s in before))
    first = placement[0]
    ends[first] = max(ends[first], last_gradient + weight[0])
    return ends


def grid(schedule: Schedule, marks: Sequence[int] = ()) -> str:
    """The action lists, a row per rank; `marks[r]` is the position of rank r's bad cell."""
    rows = []
    for rank, actions in enumerate(schedule.actions):
        cells = [str(a) for a in actions]
        if rank < len(marks) and marks[rank] < len(cells):
            cells[marks[rank]] = f"»{cells[marks[rank]]}«"
        rows.append(f"rank {rank}: " + " ".join(cells))
    return "\n".join(rows)


def draw(timeline: Timeline, width: int = 100) -> str:
    """The timeline as text, a row per rank: digits are forwards, letters backwards or the gradients of
    inputs, capitals the gradients of weights, dots are bubbles."""
    scale = width / timeline.length if timeline.length else 0.0
    rows = []
    for spans in timeline.spans:
        row = ["·"] * width
        for action, start, end in spans:
            marks = {Kind.FORWARD: digits, Kind.WEIGHT: ascii_uppercase}.get(action.kind, ascii_lowercase)
            mark = marks[action.microbatch % len(marks)]
            for x in range(round(start * scale), round(end * scale)):
                row[x] = mark
        rows.append("".join(row))
    return "\n".join(rows)
