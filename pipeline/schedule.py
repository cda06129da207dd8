"""Pipeline schedules: which rank computes which action, in which order. Pure functions without torch or communication.

Legend. Stages are numbered s = 0 … S − 1 in the order of the forward pass, micro-batches i = 0 … m − 1, pipeline ranks
r = 0 … p − 1. A schedule is one list of actions per rank; `.` in a diagram is a bubble, in which the rank is idle.

    F(s, i)  FORWARD          needs the output of F(s − 1, i)
    B(s, i)  BACKWARD         needs F(s, i) and the input gradient of B(s + 1, i)
    I(s, i)  BACKWARD_INPUT   the part of B(s, i) that computes the gradient of the stage's input; needs what B needs
    W(s, i)  BACKWARD_WEIGHT  the part of B(s, i) that computes the gradients of its weights; needs I(s, i)

A rank's list has three phases. For 1F1B on two ranks with three micro-batches:

    rank 0  F0 │ F1 .  B0 F2 B1 │ .  B2        [1] warm-up: forwards only
    rank 1  .  │ F0 B0 F1 B1 F2 B2             [2] steady state: forwards and backwards alternate
           [1]         [2]        [3]          [3] cool-down: the backwards that remain

The engine executes these lists and the simulator predicts their timeline. The dependencies determine communication:
an action receives its input from the rank of the stage that computed it. Every schedule runs the backwards of a
stage in ascending order of micro-batches, so gradients are summed in one order and are bitwise identical under all
schedules. In the docstrings, F, B, I and W also denote the duration of an action of all layers of a rank, where
B = I + W. "Memory" is the number of micro-batches whose activations a rank keeps, "Bubble" its idle time per step.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple, cast


class ActionKind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


class Action(NamedTuple):
    kind: ActionKind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"

    def describe(self) -> str:
        """Return the action in words, such as ``backward of stage 1, micro-batch 3``."""
        return f"{self.kind.name.lower().replace('_', ' ')} of stage {self.stage}, micro-batch {self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """`actions[r]` lists the actions of pipeline rank r in order; `placement[s]` is the rank that holds stage s."""

    name: str
    microbatches: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.placement)


def round_robin(ranks: int, stages_per_rank: int = 1) -> tuple[int, ...]:
    """Place stage s on rank s mod `ranks`."""
    return tuple(range(ranks)) * stages_per_rank


def v_shape(ranks: int) -> tuple[int, ...]:
    """Place stages r and 2p − 1 − r on rank r, so that rank 0 holds the first and the last stage."""
    return (*range(ranks), *reversed(range(ranks)))


def _forward(stage: int, microbatches: range) -> list[Action]:
    return [Action(ActionKind.FORWARD, stage, i) for i in microbatches]


def _backward(stage: int, microbatches: range) -> list[Action]:
    return [Action(ActionKind.BACKWARD, stage, i) for i in microbatches]


def forward_only(placement: tuple[int, ...], microbatches: int) -> Schedule:
    """Evaluation: one forward of every micro-batch through all stages, for any placement."""
    lists: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    stages = len(placement)
    for step in range(microbatches + stages - 1):
        for s in range(max(0, step - microbatches + 1), min(stages, step + 1)):
            lists[placement[s]].append(Action(ActionKind.FORWARD, s, step - s))
    return Schedule("forward only", microbatches, placement, tuple(map(tuple, lists)))


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """GPipe: all forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965, §2.3).

    Memory: m micro-batches. Bubble: (p − 1)(F + B), which is (p − 1) / (m + p − 1) of the step.

    rank 0  F0 F1 F2 .  .  B0 B1 B2
    rank 1  .  F0 F1 F2 B0 B1 B2 .
    """
    every = range(microbatches)
    actions = tuple(tuple(_forward(s, every) + _backward(s, every)) for s in range(ranks))  # [1] [3]
    return Schedule("gpipe", microbatches, round_robin(ranks), actions)


def one_forward_one_backward(ranks: int, microbatches: int) -> Schedule:
    """1F1B (Narayanan et al. 2021, arXiv 2006.09503, §3.2: PipeDream-Flush).

    Memory: at most p − r micro-batches on rank r. Bubble: that of GPipe, (p − 1)(F + B).

    rank 0  F0 F1 .  B0 F2 B1 .  B2
    rank 1  .  F0 B0 F1 B1 F2 B2 .
    """
    lists = []
    for s in range(ranks):
        warmup = min(microbatches, ranks - 1 - s)
        actions = _forward(s, range(warmup))  # [1]
        for i in range(microbatches - warmup):  # [2]
            actions += [Action(ActionKind.FORWARD, s, warmup + i), Action(ActionKind.BACKWARD, s, i)]
        lists.append(tuple(actions + _backward(s, range(microbatches - warmup, microbatches))))  # [3]
    return Schedule("1f1b", microbatches, round_robin(ranks), tuple(lists))


def interleaved(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """Interleaved 1F1B: `chunks` = v stages on each rank (Narayanan et al. 2021, arXiv 2104.04473, §2.2).

    Micro-batches pass in groups of at least p through the first stage of every rank, then through the second, and so
    on; unlike in the paper, m need not be a multiple of p. With g micro-batches in the first group:

    Memory: at most 2(p − 1 − r) + (v − 1)g + 1 micro-batches of one stage, which has 1/v of a rank's layers.
    Bubble: (p − 1)(F + B) / v where p divides m; it sends v times the messages of 1F1B.
    """
    groups = max(1, microbatches // ranks)
    edges = [-(-g * microbatches // groups) for g in range(groups + 1)]  # rounded up: the first group is the largest
    units = [(c, range(a, b)) for a, b in pairwise(edges) for c in range(chunks)]
    mirrored = [(chunks - 1 - c, group) for c, group in units]
    lists = []
    for r in range(ranks):
        forwards = [action for c, group in units for action in _forward(c * ranks + r, group)]
        backwards = [action for c, group in mirrored for action in _backward(c * ranks + r, group)]
        warmup = min(len(forwards), 2 * (ranks - 1 - r) + (chunks - 1) * edges[1])
        steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
        lists.append(tuple(forwards[:warmup] + steady + backwards[len(forwards) - warmup :]))  # [1] [2] [3]
    return Schedule("interleaved", microbatches, round_robin(ranks, chunks), tuple(lists))


def _zero_bubble(name: str, ranks: int, microbatches: int, warmup: list[int], delay: list[int]) -> Schedule:
    """Rank r runs `warmup[r]` forwards before its first I, and W(r, i) after I(r, i + delay[r])."""
    lists = []
    for r in range(ranks):
        actions = _forward(r, range(min(warmup[r], microbatches)))  # [1]
        for i in range(microbatches + delay[r]):  # [2], then [3] once no forward remains
            if i < microbatches:
                actions.append(Action(ActionKind.BACKWARD_INPUT, r, i))
            if i - delay[r] >= 0:
                actions.append(Action(ActionKind.BACKWARD_WEIGHT, r, i - delay[r]))
            if i + warmup[r] < microbatches:
                actions.append(Action(ActionKind.FORWARD, r, i + warmup[r]))
        lists.append(tuple(actions))
    return Schedule(name, microbatches, round_robin(ranks), tuple(lists))


def zero_bubble_h1(ranks: int, microbatches: int) -> Schedule:
    """ZB-H1: weight gradients fill the bubbles at the end of 1F1B (Qi et al. 2023, arXiv 2401.10241, §2.1).

    Memory: at most p micro-batches on every rank, as on rank 0 of 1F1B.
    Bubble: (p − 1)(F + I − W) for m ≥ p, a third of that of 1F1B where F = I = W.

    rank 0  F0 F1 .  I0 W0 F2 I1 W1 I2 W2
    rank 1  .  F0 I0 F1 I1 W0 F2 I2 W1 W2
    """
    return _zero_bubble("zb-h1", ranks, microbatches, [ranks - r for r in range(ranks)], list(range(ranks)))


def zero_bubble_2p(ranks: int, microbatches: int) -> Schedule:
    """ZB-H2 of Qi et al. 2023, arXiv 2401.10241, §2.2, within the memory limit 2p that the paper calls ZB-2p.

    Memory: at most 2p − 1 micro-batches.
    Bubble: (p − 1)(F + I − 2W) for m ≥ 2p − 1; where F = I = W, none between a rank's first and last action.

    rank 0  F0 F1 F2 I0 W0 I1 W1 I2 W2 .
    rank 1  .  F0 I0 F1 I1 F2 I2 W0 W1 W2
    """
    warmup = [2 * (ranks - r) - 1 for r in range(ranks)]
    return _zero_bubble("zb-2p", ranks, microbatches, warmup, [2 * r for r in range(ranks)])


def zero_bubble_v(ranks: int, microbatches: int) -> Schedule:
    """ZB-V: two stages on each rank, placed in a V (Qi et al. 2023, arXiv 2401.10241).

    The lists are built greedily, with equal cost for all actions: the next action is the one that can start first.
    Among the actions of one rank that can start at the same time, I comes before F, F before W, and a later stage
    before an earlier one.

    Memory: at most 2p micro-batches of one stage, which has half of a rank's layers: as much as rank 0 of 1F1B.
    Bubble: where F = I = W and m ≥ 2p, at most (p − 1)F / 2 at the start of a step plus one F.
    """
    placement = v_shape(ranks)
    stages = len(placement)
    done: dict[Action, int] = {}  # the time at which each action ends
    clock = [0] * ranks
    held = [0] * ranks
    lists: list[list[Action]] = [[] for _ in range(ranks)]
    priority = (ActionKind.BACKWARD_INPUT, ActionKind.FORWARD, ActionKind.BACKWARD_WEIGHT)
    count = {kind: [0] * stages for kind in priority}

    def options(rank: int) -> Iterator[tuple[int, int, int, int, Action]]:
        """The actions that a rank can run next as (start, rank, priority, −stage, action); the smallest is best."""
        for stage in (rank, stages - 1 - rank):
            for order, (kind, counts) in enumerate(count.items()):
                action = Action(kind, stage, counts[stage])
                full = kind is ActionKind.FORWARD and held[rank] == stages
                if counts[stage] < microbatches and not full:
                    ends = [done.get(a) for a in dependencies(action, stages)]
                    if None not in ends:
                        yield max([clock[rank], *cast(list[int], ends)]), rank, order, -stage, action

    best = {rank: list(options(rank)) for rank in range(ranks)}
    while any(best.values()):
        start, rank, *_, action = min(min(choices) for choices in best.values() if choices)
        done[action] = clock[rank] = start + 1
        lists[rank].append(action)
        count[action.kind][action.stage] += 1
        held[rank] += {ActionKind.FORWARD: 1, ActionKind.BACKWARD_WEIGHT: -1}.get(action.kind, 0)
        for changed in {rank, *placement[max(0, action.stage - 1) : action.stage + 2]}:
            best[changed] = list(options(changed))
    return Schedule("zb-v", microbatches, placement, tuple(map(tuple, lists)))


def dual_pipe_v(ranks: int, microbatches: int) -> Schedule:
    """DualPipeV: ZB-V's placement in a fixed order (DeepSeek 2025, https://github.com/deepseek-ai/DualPipe).

    In the steady state every backward follows a forward of the rank's other stage, which it does not depend on.
    DeepSeek's implementation overlaps the two, so that the all-to-all of one is hidden by the computation of the other;
    the engine executes them one after another. Unlike DeepSeek's, m can be less than 2p.

    Memory: at most 2p + 1 micro-batches of one stage, which has half of a rank's layers.
    Bubble: (p − 1)F / 2 where F = I = W and m ≥ 2p. It depends less on the durations than that of ZB-V.
    """
    placement = v_shape(ranks)
    lists = []
    for r in range(ranks):
        below = ranks - 1 - r  # ranks between this one and the turn of the V
        # 0 is the rank's first stage, 1 the second one. B is I with its W, and a single W belongs to the earliest I.
        pattern = "F0 " * 2 * below + "F0 F1 " * (r + 1) + "I1 W F1 " * below  # [1]
        pattern += "F0 B1 F1 B0 " * (microbatches - 2 * ranks + r + 1) + "B1 F1 B0 " * below  # [2]
        pattern += "".join(f"{'B' if n <= r else 'I'}{1 - n % 2} " for n in range(2 * r + 2))  # [3]
        pattern += "W I0 " * below + "W " * 2 * ranks
        lists.append(_expand(pattern, (r, len(placement) - 1 - r), microbatches))
    return Schedule("dualpipev", microbatches, placement, tuple(lists))


def _expand(pattern: str, stages: tuple[int, int], microbatches: int) -> tuple[Action, ...]:
    """The actions of a pattern of `dual_pipe_v`. A word is skipped if none of its actions is left."""
    actions: list[Action] = []
    pending: deque[Action] = deque()  # W whose I is in the list
    count = dict.fromkeys(("F0", "F1", "I0", "I1"), 0)
    for word in pattern.split():
        if word == "W":
            actions += [pending.popleft()] if pending else []
            continue
        kind = ActionKind.FORWARD if word[0] == "F" else ActionKind.BACKWARD_INPUT
        number = f"{kind}{word[1]}"
        stage, i = stages[int(word[1])], count[number]
        if i == microbatches:
            continue
        count[number] += 1
        actions.append(Action(kind, stage, i))
        if word[0] == "B":
            actions.append(Action(ActionKind.BACKWARD_WEIGHT, stage, i))
        elif word[0] == "I":
            pending.append(Action(ActionKind.BACKWARD_WEIGHT, stage, i))
    return tuple(actions)


def dependencies(action: Action, stages: int) -> list[Action]:
    """The actions whose results an action needs (see the legend). All backwards of a schedule are split, or none."""
    kind, stage, i = action
    if kind is ActionKind.FORWARD:
        return [Action(kind, stage - 1, i)] if stage > 0 else []
    if kind is ActionKind.BACKWARD_WEIGHT:
        return [Action(ActionKind.BACKWARD_INPUT, stage, i)]
    next_stage = [Action(kind, stage + 1, i)] if stage < stages - 1 else []
    return [Action(ActionKind.FORWARD, stage, i), *next_stage]


@dataclass(frozen=True)
class ScheduleSpec:
    """The properties of a schedule that are known without building it.

    builder: (ranks, microbatches) → Schedule. placement: ranks → the rank of each stage, as in the built schedule.
    """

    name: str
    stages_per_rank: int
    splits_backward: bool
    builder: Callable[[int, int], Schedule]
    placement: Callable[[int], tuple[int, ...]] = round_robin


SCHEDULES: dict[str, ScheduleSpec] = {
    spec.name: spec
    for spec in (
        ScheduleSpec("gpipe", 1, False, gpipe),
        ScheduleSpec("1f1b", 1, False, one_forward_one_backward),
        ScheduleSpec("interleaved", 2, False, interleaved, lambda ranks: round_robin(ranks, 2)),
        ScheduleSpec("zb-h1", 1, True, zero_bubble_h1),
        ScheduleSpec("zb-2p", 1, True, zero_bubble_2p),
        ScheduleSpec("zb-v", 2, True, zero_bubble_v, v_shape),
        ScheduleSpec("dualpipev", 2, True, dual_pipe_v, v_shape),
    )
}
