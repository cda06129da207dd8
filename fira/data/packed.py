"""Tokens on disk: one or more one-dimensional `.npy` files, read as one concatenated array."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.lib import format as npy

from fira.data.sources import check_regular
from fira.errors import UserError
from fira.files import one_line

SCAN_TOKENS = 2**22  # tokens read at a time when a whole array is scanned


class PackedTokens:
    """The concatenated tokens of `.npy` files. The files are memory-mapped, so only requested tokens are loaded."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._arrays = [_map(path) for path in paths]
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


def _map(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
            shape, _, dtype = read_header(file)
            offset = file.tell()
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python, and raises what the parser raises
        raise UserError(f"{path}: not a complete .npy file ({one_line(error)}); download it again") from None
    if len(shape) != 1 or dtype.kind not in "ui":
        raise UserError(f"{path}: holds {dtype} {shape}, not a 1-d array of token ids; give other shards")
    size = offset + shape[0] * dtype.itemsize
    if path.stat().st_size != size:
        raise UserError(f"{path}: not a complete .npy file ({path.stat().st_size} bytes of {size}); download it again")
    return np.memmap(path, dtype, "r", offset, shape)


@dataclass(frozen=True)
class Source:
    """The tokens of a source and its share of the training sequences."""

    weight: float
    train: PackedTokens
    val: PackedTokens


def find_shards(data: str | None) -> tuple[list[Path], list[Path]] | None:
    """Find FineWeb-Edu style shards in the folder `data`: (`*_train_*.npy`, `*_val_*.npy`), or None if it has none.

    Raises UserError if there are shards of one kind only, or where `data` is a single shard.
    """
    if data is None:
        return None
    if data.lower().endswith(".npy"):
        raise UserError(f"{data}: a single shard; give the folder that contains *_train_*.npy and *_val_*.npy")
    train, val = (
        sorted(path for path in Path(data).glob(f"*_{split}_*") if path.suffix.lower() == ".npy")
        for split in ("train", "val")
    )
    if bool(train) != bool(val):
        raise UserError(
            f"{data}: no *_{'val' if train else 'train'}_*.npy in this folder; training needs both kinds of shard"
        )
    for path in train + val:
        check_regular(path)
    return (train, val) if train else None


class TokenWriter:
    """Writes a `.npy` file of tokens in several calls of `append`, complete when the `with` block ends.

    length: the number of tokens written. The dtype is uint16 where the vocabulary allows it, else uint32.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._vocab_size = vocab_size
        self._file = path.open("wb")
        self.length = 0
        self._write_header()

    def append(self, ids: Sequence[int]) -> None:
        """Write ids. Raises OverflowError for an id outside the vocabulary."""
        array = np.asarray(ids)
        if len(array) and array.max() >= self._vocab_size:
            raise OverflowError(f"token id {array.max()}, vocabulary of {self._vocab_size}")
        self._file.write(array.astype(self._dtype).tobytes())
        self.length += len(array)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()

    def _write_header(self) -> None:
        """Write the header; numpy pads it such that its size does not depend on the length of the first axis."""
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        npy.write_array_header_1_0(self._file, description)
