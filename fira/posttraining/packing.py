"""Best-fit-decreasing packing of examples into sequences (Johnson 1974; for training, Ding et al. 2024).

lengths   7 5 3 3 2, capacity 8
sequences [7] [5 3] [3 2]        each example, the longest first, into the fullest sequence that has room for it
room       1    0     3
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Return the indices of the examples of each sequence; every example is in exactly one, as a whole.

    lengths: number of tokens of each example, from 1 to `capacity`. The result is a function of the arguments. The time
    does not depend on the number of sequences.
    """
    lengths = np.asarray(lengths, np.int64)
    sequences: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # numbers of the sequences, by their room
    rooms = 0  # bit r: a sequence has room for exactly r tokens more
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        if not 1 <= length <= capacity:
            raise ValueError(f"an example of {length} tokens, sequences of {capacity}")
        if enough := rooms >> length:
            room = length + (enough & -enough).bit_length() - 1  # the smallest one
            number = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
        else:
            room, number = capacity, len(sequences)
            sequences.append([])
        sequences[number].append(index)
        with_room[room - length].append(number)
        rooms |= 1 << (room - length)
    return sequences
