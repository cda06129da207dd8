"""Tokens on disk: one or more one-dimensional `.npy` files, read as one concatenated array."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.lib import format as npy

from fira.errors import UserError

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
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a complete .npy file ({error}); download it again") from None
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise UserError(f"{path}: holds {array.dtype} {array.shape}, not a 1-d array of token ids; give other shards")
    return array


def find_shards(data: str | None) -> tuple[list[Path], list[Path]] | None:
    """Find FineWeb-Edu style shards in the folder `data`: (`*_train_*.npy`, `*_val_*.npy`), or None if it has none.

    Raises UserError if there are shards of one kind only, or where `data` is a single shard.
    """
    if data is None:
        return None
    if data.endswith(".npy"):
        raise UserError(f"{data}: a single shard; give the folder that contains *_train_*.npy and *_val_*.npy")
    train, val = (sorted(Path(data).glob(f"*_{split}_*.npy")) for split in ("train", "val"))
    if bool(train) != bool(val):
        raise UserError(
            f"{data}: no *_{'val' if train else 'train'}_*.npy in this folder; training needs both kinds of shard"
        )
    return (train, val) if train else None


class TokenWriter:
    """Writes a `.npy` file of tokens in several calls of `append`, complete when the `with` block ends.

    length: the number of tokens written. The dtype is uint16 where the vocabulary allows it, else uint32.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._file = path.open("wb")
        self.length = 0
        self._write_header()

    def append(self, ids: list[int]) -> None:
        self._file.write(np.array(ids, self._dtype).tobytes())
        self.length += len(ids)

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
