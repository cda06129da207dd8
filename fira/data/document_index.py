"""Indices of the documents in a file of token ids.

x.bin, x.idx         Megatron-LM: x.idx has the dtype, the length and the byte offset of each sequence, and the
                     first sequence of each document; a sequence is a document, or one of its sentences
x.ds, x.ds.index     nanotron, written by datatrove: x.ds.index has the end of each document, in tokens
"""

import struct
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np

from fira.errors import UserError

HEAD = struct.Struct("<9sQBQQ")  # of Megatron: magic, version, code of the dtype, number of sequences, of documents + 1
MAGIC = b"MMIDIDX\0\0"
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
OFFSET = np.dtype("<i8")


class DocumentIndex(Protocol):
    """The documents of a token file. dtype: of a token."""

    @property
    def dtype(self) -> np.dtype: ...

    def next_document(self, token: int) -> int:
        """Return where the first document begins that begins at or after a token, or the number of tokens.

        Only a few numbers of the index are read.
        """

    def check(self) -> None:
        """Raise UserError unless the index describes all bytes of the file, in order and without gaps."""


def index_of(path: Path) -> Path | None:
    """Return the index of a token file, if there is one."""
    suffix = path.suffix.lower()
    index = path.with_name(path.name + ".index") if suffix == ".ds" else path.with_suffix(".idx")
    return index if suffix in (".ds", ".bin") and index.is_file() else None


def open_index(path: Path, index: Path) -> DocumentIndex:
    """Open the index of the tokens in `path`. Raises UserError if it is not an index, or one of another file."""
    if index.suffix == ".index":
        return DatatroveIndex.open(path, index)
    return MegatronIndex.open(path, index)


class MegatronIndex(NamedTuple):
    """documents: int64, the first sequence of each document, and the number of sequences.

    lengths, offsets: int32 tokens and int64 bytes, of each sequence.
    """

    path: Path
    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray

    @classmethod
    def open(cls, path: Path, index: Path) -> Self:
        with index.open("rb") as file:
            magic, version, code, sequences, documents = HEAD.unpack(file.read(HEAD.size).ljust(HEAD.size, b"\0"))
        if magic != MAGIC or version != 1 or code not in DTYPES:
            raise UserError(f"{index}: not an index of Megatron-LM, version 1, with integers; remove or replace it")
        size, expected = index.stat().st_size, HEAD.size + 12 * sequences + 8 * documents
        if size != expected or documents == 0:
            raise UserError(f"{index}: {size} bytes instead of {expected}, incomplete or multimodal; copy it again")
        lengths = mapped(index, np.dtype("<i4"), HEAD.size, sequences)
        offsets = mapped(index, OFFSET, HEAD.size + 4 * sequences, sequences)
        return cls(
            path, np.dtype(DTYPES[code]), lengths, offsets, mapped(index, OFFSET, HEAD.size + 12 * sequences, documents)
        )

    def next_document(self, token: int) -> int:
        sequence = bisect_left(self.offsets, token * self.dtype.itemsize)
        document = min(bisect_left(self.documents, sequence), len(self.documents) - 1)
        first = int(self.documents[document])
        end = int(self.offsets[first]) if first < len(self.offsets) else self.path.stat().st_size
        return end // self.dtype.itemsize

    def check(self) -> None:
        sizes = self.lengths.astype(np.int64) * self.dtype.itemsize
        in_order = self.documents[0] == 0 and _ascends(self.documents) and bool((self.lengths >= 0).all())
        complete = int(sizes.sum()) == self.path.stat().st_size and int(self.documents[-1]) == len(self.offsets)
        if not (in_order and complete and np.array_equal(self.offsets, sizes.cumsum() - sizes)):
            raise _mismatch(self.path)


class DatatroveIndex(NamedTuple):
    """ends: uint64, the end of each document in tokens."""

    path: Path
    dtype: np.dtype
    ends: np.ndarray

    @classmethod
    def open(cls, path: Path, index: Path) -> Self:
        ends = mapped(index, np.dtype("<u8"), 0)
        size, tokens = path.stat().st_size, int(ends[-1]) if len(ends) else 0
        if tokens == 0 or size not in (2 * tokens, 4 * tokens):
            raise _mismatch(path)
        return cls(path, np.dtype(f"<u{size // tokens}"), ends)

    def next_document(self, token: int) -> int:
        return int(self.ends[bisect_left(self.ends, token)]) if token else 0

    def check(self) -> None:
        if not _ascends(self.ends):
            raise _mismatch(self.path)


def mapped(path: Path, dtype: np.dtype, offset: int, count: int | None = None) -> np.ndarray:
    """Memory-map `count` numbers from byte `offset` on; None: all. Raises UserError if the last one is incomplete."""
    size = path.stat().st_size - offset
    if count is None and size % dtype.itemsize:
        raise UserError(f"{path}: {size} bytes are not whole numbers of {dtype.itemsize} bytes; copy the file again")
    count = size // dtype.itemsize if count is None else count
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)


def _ascends(numbers: np.ndarray) -> bool:
    return bool((numbers[1:] >= numbers[:-1]).all())


def _mismatch(path: Path) -> UserError:
    return UserError(f"{path}: its index does not describe the whole file; copy both files again")
