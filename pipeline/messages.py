"""Messages between stages, and the channels between the ranks of a pipeline that carry them.

    stage s − 1 ── Message(FORWARD, s, i): the output of F(s − 1, i) ──────────────────► stage s
    stage s − 1 ◄─ Message(BACKWARD, s − 1, i): the input gradient of B(s, i) ────────── stage s

A channel carries the messages of one direction from one rank to another. Every channel has a process group of its own,
because NCCL executes the operations of a communicator in the order in which they are posted: on a communicator for
both directions, a receive that is posted ahead would block the send that the other rank waits for.
"""

from collections.abc import Sequence
from enum import Enum
from itertools import pairwise
from typing import NamedTuple


class Direction(Enum):
    FORWARD = 0  # the output of stage − 1
    BACKWARD = 1  # the input gradient of stage + 1


class Message(NamedTuple):
    """The tensor that a stage receives for a micro-batch: its input, or the gradient of its output."""

    direction: Direction
    stage: int  # the receiver
    microbatch: int


class Channel(NamedTuple):
    """The route of the messages of one direction between two ranks of the pipeline."""

    direction: Direction
    source: int
    destination: int

    def __str__(self) -> str:
        return f"{self.direction.name.lower()} {self.source} → {self.destination}"


def channels_of(placement: Sequence[int], rank: int) -> list[Channel]:
    """The channels from and to a rank, in an order in which all ranks can use theirs one after another.

    placement: the rank of each stage.
    """
    crossings = sorted({(a, b) for a, b in pairwise(placement) if a != b and rank in (a, b)})
    forward = [Channel(Direction.FORWARD, a, b) for a, b in crossings]
    return forward + [Channel(Direction.BACKWARD, b, a) for a, b in crossings]
