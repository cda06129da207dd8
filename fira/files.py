"""Files that are on the disk when a call returns, and errors that name the file they concern."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fira.errors import UserError


def write(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with naming(path):
        path.write_bytes(content)
    sync(path)


def sync(path: Path) -> None:
    """Wait until the file, or the names in the folder, at `path` are on the disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What fails inside concerns `path`: a full disk does not say of itself which file it could not take."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(f"{path}: {reason}") from error
