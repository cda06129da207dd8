"""Data files as streams of bytes: decompressed, and counted for a progress bar."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

CODECS = {".gz": "gzip", ".zst": "zstd"}  # by suffix; several frames in one file are read one after another

Advance = Callable[[int], object]  # called with the number of bytes that were read, for a progress bar


class _CountedFile(io.FileIO):
    """A file, opened for reading, that reports the number of bytes of each read."""

    def __init__(self, path: Path, advance: Advance) -> None:
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._advance(count or 0)
        return count


def suffix_of(path: Path) -> str:
    """Return the suffix that selects the reader, in lower case, with that of the compression: ".txt", ".jsonl.gz"."""
    name = path.name.lower()
    name = name.removesuffix(".tgz") + ".tar.gz" if name.endswith(".tgz") else name
    count = 2 if Path(name).suffix in CODECS else 1
    return "".join(Path(name).suffixes[-count:])


def format_of(path: Path) -> str:
    """Return the suffix that selects the reader, in lower case, without that of the compression.

    Compressed JSON is JSON Lines, as in C4.
    """
    suffix = suffix_of(path)
    inner = suffix.removesuffix(compression_of(path))
    return ".jsonl" if inner == ".json" != suffix else inner


def compression_of(path: Path) -> str:
    """Return the suffix of the compression, ".gz" or ".zst", or an empty text."""
    return next((suffix for suffix in CODECS if suffix_of(path).endswith(suffix)), "")


def open_bytes(path: Path, advance: Advance = lambda _: None) -> io.BufferedReader:
    """Open a file for reading, decompressed according to its suffix. advance: called with the bytes of the file itself.

    Reading raises OSError without an `errno` where the compressed data are damaged or end too early.
    """
    return decompressed(io.BufferedReader(_CountedFile(path, advance)), path)


def decompressed(file: io.BufferedReader, name: Path) -> io.BufferedReader:
    """Return a stream of the decompressed bytes of `file`, according to the suffix of its name."""
    if compression := compression_of(name):
        import pyarrow as pa  # here, because it is large and only these files require it

        return io.BufferedReader(pa.CompressedInputStream(file, CODECS[compression]))
    return file
