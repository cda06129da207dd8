"""Writes that are flushed to the disk, files of settings, and errors that name the file."""

import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fira.errors import UserError

LONGEST_TOML = 2**16  # bytes; the time to read nested keys is quadratic in their number


def write(path: Path, content: bytes) -> None:
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


def read_toml(path: str | Path, name: str) -> dict[str, Any]:
    """The content of a file of settings. name: the file's name in messages. Raises UserError if it is not TOML."""
    try:
        with open(path, "rb") as file:
            content = file.read(LONGEST_TOML + 1)
        if len(content) > LONGEST_TOML:
            raise UserError(f"{name}: more than {LONGEST_TOML:,} bytes; give a TOML file of settings")
        return tomllib.loads(content.decode())
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}; give a TOML file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not TOML: {error}") from None
