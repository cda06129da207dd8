"""Pipeline schedules: who computes what, in which order. Pure functions, no communication, no torch.

A schedule is one list of actions per rank. `F(s, i)` is the forward of micro-batch i through stage s, `B(s, i)` its
backward, which may be split: `I(s, i)` gives the gradient of the stage's input, `W(s, i)` later those of its weights.
What must travel between ranks follows from the actions: F(s, i) needs the output of F(s − 1, i), B(s, i) and I(s, i)
the input gradient of stage s + 1. The engine reads these lists, the simulator reads the same lists.

Every schedule runs the backwards of a stage in ascending micro-batch order, so gradients are summed in one order and
all schedules give the same bits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple, cast


class Kind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"  # the half of a backward that another rank waits for
    WEIGHT = "W"  # the half that nobody waits for


class Action(NamedTuple):
    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """`actions[r]` is what rank r of the pipeline does, in order; `placement[s]` is the rank that holds stage s."""

    name: str
    microbatches: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.placement)


def round_robin(ranks: int, chunks: int = 1) -> tuple[int, ...]:
    """The placement of `chunks` stages per rank: stage s on rank s mod `ranks`."""
    return tuple(range(ranks)) * chunks


def v_shape(ranks: int) -> tuple[int, ...]:
    """The placement of two stages per rank: stages r and 2 · ranks − 1 − r on rank r."""
    return (*range(ranks), *reversed(range(ranks)))


def _forward(stage: int, microbatches: range) -> list[Action]:
    return [Action(Kind.FORWARD, stage, i) for i in microbatches]


def _backward(stage: int, microbatches: range) -> list[Action]:
    return [Action(Kind.BACKWARD, stage, i) for i in microbatches]


def forward_only(placement: tuple[int, ...], microbatches: int) -> Schedule:
    """Evaluation: every micro-batch goes through once, on whichever ranks the stages are."""
    lists: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    stages = len(placement)
    for turn in range(microbatches + stages - 1):
        for s in range(max(0, turn - microbatches + 1), min(stages, turn + 1)):
            lists[placement[s]].append(Action(Kind.FORWARD, s, turn - s))
    return Schedule("forward only", microbatches, placement, tuple(map(tuple, lists)))


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965). Keeps every micro-batch's activations.

    rank 0  F0 F1 F2 .  .  B0 B1 B2
    rank 1  .  F0 F1 F2 B0 B1 B2 .
    """
    every = range(microbatches)
    actions = tuple(tuple(_forward(s, every) + _backward(s, every)) for s in range(stages))
    return Schedule("gpipe", microbatches, tuple(range(stages)), actions)


def one_forward_one_backward(stages: int, microbatches: int) -> Schedule:
    """1F1B (Narayanan et al. 2019, PipeDream-Flush): stage s holds at most `stages − s` micro-batches' activations.

    rank 0  F0 F1 .  B0 F2 B1 .  B2
    rank 1  .  F0 B0 F1 B1 F2 B2 .
    """
    lists = []
    for s in range(stages):
        ahead = min(microbatches, stages - 1 - s)
        actions = _forward(s, range(ahead))
        for i in range(microbatches - ahead):
            actions += [Action(Kind.FORWARD, s, ahead + i), Action(Kind.BACKWARD, s, i)]
        lists.append(tuple(actions + _backward(s, range(microbatches - ahead, microbatches))))
    return Schedule("1f1b", microbatches, tuple(range(stages)), tuple(lists))


def interleaved(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """1F1B with `chunks` stages on each rank, dealt in turns (Narayanan et al. 2021, arXiv 2104.04473, §2.2).

    A micro-batch comes by every rank `chunks` times, so ranks start sooner: the bubble is 1/chunks of 1F1B's, for
    chunks times the messages. Micro-batches go in groups of at least `ranks` through the first chunk, then the next.
    """
    groups = max(1, microbatches // ranks)
    edges = [-(-g * microbatches // groups) for g in range(groups + 1)]  # the first group is as large as any
    units = [(c, range(a, b)) for a, b in pairwise(edges) for c in range(chunks)]
    mirrored = [(chunks - 1 - c, group) for c, group in units]
    lists = []
    for r in range(ranks):
        forwards = [action for c, group in units for action in _forward(c * ranks + r, group)]
        backwards = [action for c, group in mirrored for action in _backward(c * ranks + r, group)]
        ahead = min(len(forwards), 2 * (ranks - 1 - r) + (chunks - 1) * edges[1])
        steady = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
        lists.append(tuple(forwards[:ahead] + steady + backwards[len(forwards) - ahead :]))
    return Schedule("interleaved", microbatches, round_robin(ranks, chunks), tuple(lists))


def _zero_bubble(name: str, ranks: int, microbatches: int, ahead: list[int], late: list[int]) -> Schedule:
    """Rank r runs `ahead[r]` forwards before the first backward, and a W `late[r]` micro-batches after its I."""
    lists = []
    for r in range(ranks):
        actions = _forward(r, range(min(ahead[r], microbatches)))
        for i in range(microbatches + late[r]):
            if i < microbatches:
                actions.append(Action(Kind.INPUT, r, i))
            if i - late[r] >= 0:
                actions.append(Action(Kind.WEIGHT, r, i - late[r]))
            if i + ahead[r] < microbatches:
                actions.append(Action(Kind.FORWARD, r, i + ahead[r]))
        lists.append(tuple(actions))
    return Schedule(name, microbatches, tuple(range(ranks)), tuple(lists))


def zero_bubble_h1(ranks: int, microbatches: int) -> Schedule:
    """ZB-H1 (Qi et al. 2023, arXiv 2401.10241): weight gradients fill the bubbles of 1F1B at the end of a step.

    A rank holds at most `ranks` micro-batches' activations, as rank 0 does under 1F1B. With F, I and W of equal cost
    the bubble is a third of 1F1B's.

    rank 0  F0 F1 .  I0 W0 F2 I1 W1 I2 W2
    rank 1  .  F0 I0 F1 I1 W0 F2 I2 W1 W2
    """
    return _zero_bubble("zb-h1", ranks, microbatches, [ranks - r for r in range(ranks)], list(range(ranks)))


def zero_bubble_2p(ranks: int, microbatches: int) -> Schedule:
    """ZB-H2 of the same paper, limited to `2 · ranks` micro-batches' activations ("ZB-2p").

    More forwards at the start leave no rank idle between its first and last action.

    rank 0  F0 F1 F2 I0 W0 I1 W1 I2 W2 .
    rank 1  .  F0 I0 F1 I1 F2 I2 W0 W1 W2
    """
    ahead = [2 * (ranks - r) - 1 for r in range(ranks)]
    return _zero_bubble("zb-2p", ranks, microbatches, ahead, [2 * r for r in range(ranks)])


def zero_bubble_v(ranks: int, microbatches: int) -> Schedule:
    """ZB-V of the same paper: rank r has stages r and 2 · ranks − 1 − r, so first and last stage share rank 0.

    No rank waits for the end of another, and each holds what 1F1B holds on rank 0: `2 · ranks` half-sized stages'
    activations. The lists are dealt greedily, all actions of equal cost: the action that can start first is next;
    among those that can start at once an I goes before an F, an F before a W, and a later stage before an earlier one.
    """
    placement = v_shape(ranks)
    stages = len(placement)
    done: dict[Action, int] = {}  # when it ends
    clock = [0] * ranks
    held = [0] * ranks
    lists: list[list[Action]] = [[] for _ in range(ranks)]
    count = {kind: [0] * stages for kind in (Kind.INPUT, Kind.FORWARD, Kind.WEIGHT)}

    def choices(rank: int) -> Iterator[tuple[int, int, int, int, Action]]:
        """What a rank can do next, the best being the least."""
        for stage in (rank, stages - 1 - rank):
            for order, (kind, counts) in enumerate(count.items()):
                action = Action(kind, stage, counts[stage])
                full = kind is Kind.FORWARD and held[rank] == stages
                if counts[stage] < microbatches and not full:
                    ends = [done.get(a) for a in needs(action, stages)]
                    if None not in ends:
                        yield max([clock[rank], *cast(list[int], ends)]), rank, order, -stage, action

    best = {rank: list(choices(rank)) for rank in range(ranks)}
    while any(best.values()):
        start, rank, *_, action = min(min(options) for options in best.values() if options)
        done[action] = clock[rank] = start + 1
        lists[rank].append(action)
        count[action.kind][action.stage] += 1
        held[rank] += {Kind.FORWARD: 1, Kind.WEIGHT: -1}.get(action.kind, 0)
        for changed in {rank, *placement[max(0, action.stage - 1) : action.stage + 2]}:
            best[changed] = list(choices(changed))
    return Schedule("zb-v", microbatches, placement, tuple(map(tuple, lists)))


def needs(action: Action, stages: int) -> list[Action]:
    """The actions that must be done before this one can start, in a schedule that splits backwards as this one."""
    kind, stage, i = action
    if kind is Kind.FORWARD:
        return [Action(kind, stage - 1, i)] if stage > 0 else []
    if kind is Kind.WEIGHT:
        return [Action(Kind.INPUT, stage, i)]
    after = [Action(kind, stage + 1, i)] if stage < stages - 1 else []
    return [Action(Kind.FORWARD, stage, i), *after]


@dataclass(frozen=True)
class ScheduleSpec:
    """What is known of a schedule without building it. `builder(ranks, microbatches)` builds it."""

    name: str
    stages_per_rank: int
    splits_backward: bool
    builder: Callable[[int, int], Schedule]
    placement: Callable[[int], tuple[int, ...]] = round_robin
    """From the number of ranks to the rank of each stage."""


SCHEDULES: dict[str, ScheduleSpec] = {
    spec.name: spec
    for spec in (
        ScheduleSpec("gpipe", 1, False, gpipe),
        ScheduleSpec("1f1b", 1, False, one_forward_one_backward),
        ScheduleSpec("interleaved", 2, False, interleaved, lambda ranks: round_robin(ranks, 2)),
        ScheduleSpec("zb-h1", 1, True, zero_bubble_h1),
        ScheduleSpec("zb-2p", 1, True, zero_bubble_2p),
        ScheduleSpec("zb-v", 2, True, zero_bubble_v, v_shape),
    )
}
