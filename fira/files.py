"""Writes that are flushed to the disk, and errors that name the file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fira.errors import UserError


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file and flush it to the disk."""
    with errors_naming(path):
        path.write_bytes(content)
    sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to the disk (fsync)."""
    with errors_naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Raise OSError and SafetensorError of the block as a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(f"{path}: {reason}") from error
