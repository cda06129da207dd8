"""Pipeline schedules: who computes what, in which order. Pure functions, no communication, no torch.

A schedule is one list of actions per rank. `F(s, i)` is the forward of micro-batch i through stage s, `B(s, i)` its
backward. What must travel between ranks follows from the actions: F(s, i) needs the output of F(s − 1, i), B(s, i)
the input gradient of B(s + 1, i). The engine reads these lists, the simulator reads the same lists.

Every schedule runs the backwards of a stage in ascending micro-batch order, so gradients are summed in one order and
all schedules give the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"


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


def _forward(stage: int, microbatches: range) -> list[Action]:
    return [Action(Kind.FORWARD, stage, i) for i in microbatches]


def _backward(stage: int, microbatches: range) -> list[Action]:
    return [Action(Kind.BACKWARD, stage, i) for i in microbatches]


def forward_only(stages: int, microbatches: int) -> Schedule:
    """Evaluation: every micro-batch goes through once."""
    actions = tuple(tuple(_forward(s, range(microbatches))) for s in range(stages))
    return Schedule("forward only", microbatches, tuple(range(stages)), actions)


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


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
