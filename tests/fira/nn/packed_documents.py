"""Documents of given lengths in sequences, for the tests of several modules."""

from collections.abc import Sequence

import torch

from fira.nn.documents import Documents


def pack(lengths: Sequence[Sequence[int]], length: int) -> Documents:
    """lengths: those of the documents of each sequence. The rest of the `length` tokens is padding."""
    numbers = torch.full((len(lengths), length), -1)
    for row, sizes in zip(numbers, lengths, strict=True):
        row[: sum(sizes)] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    return Documents.of(numbers)


def spans(lengths: Sequence[Sequence[int]]) -> list[tuple[int, int, slice]]:
    """Sequence, number, and tokens of each document."""
    result = []
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate(sizes):
            result.append((row, number, slice(start, start + size)))
            start += size
    return result
