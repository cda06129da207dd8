"""Tokens on disk: one or more files, read as one concatenated array, and files that are written."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.lib import format as npy

from fira.data.token_files import map_tokens
from fira.errors import UserError

SCAN_TOKENS = 2**22  # tokens read at a time when a whole array is scanned


class TokenSpan(NamedTuple):
    """Tokens [start, stop) of a file; None: to its end."""

    path: Path
    start: int = 0
    stop: int | None = None


class PackedTokens:
    """The concatenated tokens of files. The files are memory-mapped, so only requested tokens are loaded."""

    def __init__(self, spans: Sequence[TokenSpan]) -> None:
        self._arrays = [map_tokens(span.path)[span.start : span.stop] for span in spans]
        self._ends = list(accumulate(len(array) for array in self._arrays))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) as int64. Raises IndexError for a range outside the array."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) of {len(self)}")
        pieces = []
        for array, end in zip(self._arrays, self._ends, strict=True):
            begin = end - len(array)
            if start < end and begin < stop:
                pieces.append(array[max(start - begin, 0) : stop - begin])
        return np.concatenate(pieces, dtype=np.int64) if pieces else np.empty(0, np.int64)

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all tokens in order, at most SCAN_TOKENS at a time."""
        for start in range(0, len(self), SCAN_TOKENS):
            yield self.read(start, min(start + SCAN_TOKENS, len(self)))


@dataclass(frozen=True)
class Source:
    """The tokens of a source and its share of the training sequences."""

    weight: float
    train: PackedTokens
    val: PackedTokens


class TokenWriter:
    """Writes a `.npy` file of tokens in several calls of `append`, complete when the `with` block ends.

    length: the number of tokens written. The dtype is uint16 where the vocabulary allows it, else uint32. A file that
    has been written before is continued after its first `length` tokens. Raises UserError if it has fewer.
    """

    def __init__(self, path: Path, vocab_size: int, length: int = 0) -> None:
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._vocab_size = vocab_size
        self._file = path.open("r+b" if length else "wb")
        self.length = length
        self._write_header()
        end = self._file.tell() + length * self._dtype.itemsize
        if self._file.seek(0, os.SEEK_END) < end:
            raise UserError(f"{path}: less than {length} tokens; remove its folder, and prepare the data again")
        self._file.truncate(end)
        self._file.seek(end)

    def append(self, ids: Sequence[int]) -> None:
        """Write ids. Raises OverflowError for an id outside the vocabulary."""
        array = np.asarray(ids)
        if len(array) and array.max() >= self._vocab_size:
            raise OverflowError(f"token id {array.max()}, vocabulary of {self._vocab_size}")
        self._file.write(array.astype(self._dtype).tobytes())
        self.length += len(array)

    def flush(self) -> None:
        """Write all tokens to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._write_header()
            self.flush()

    def _write_header(self) -> None:
        """Write the header; numpy pads it such that its size does not depend on the length of the first axis."""
        self._file.seek(0)
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        npy.write_array_header_1_0(self._file, description)
