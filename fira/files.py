"""Reads with a limit, files of settings, writes that are flushed to the disk, and errors that name the file."""

import errno
import os
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from fira.errors import UserError

LONGEST_TOML = 2**16  # bytes; the time to read nested keys is quadratic in their number
LARGEST = 2**28  # bytes of a document or a tokenizer that is read as a whole
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def read(path: Path, largest: int = LARGEST) -> bytes:
    """Return the content of a file. Raises UserError for a file of more than `largest` bytes, a pipe or a device."""
    with errors_naming(path):
        if not path.is_file():
            raise UserError(f"{path} is missing or not a regular file")
        with path.open("rb") as file:
            content = file.read(largest + 1)
    if len(content) > largest:
        raise UserError(f"{path} is too large: a file of this kind has at most {largest} bytes")
    return content


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file and flush it to the disk."""
    with errors_naming(path):
        path.write_bytes(content)
    sync(path)


def replace(path: Path, content: bytes) -> None:
    """Write a file such that a process killed at any moment leaves the old or the new content."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary, content)
    except UserError:
        with suppress(OSError):  # a full disk is relieved, a read-only one has no such file
            temporary.unlink()
        raise
    with errors_naming(path):
        temporary.replace(path)


def lock(file: int | IO[Any]) -> None:
    """Lock a file or folder for this process (flock), until it is closed.

    Raises BlockingIOError or PermissionError if another process has locked it, and OSError if no lock is possible.
    """
    import fcntl  # here, because there is none on Windows

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_at(file: IO[Any], path: Path) -> bool:
    """Return whether `path` is still the file that was opened, and has not been removed or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


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
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        if isinstance(error, SafetensorError):
            reason += "; copy the file again"
        raise UserError(f"{path}: {reason}") from error


def write_remedy(error: BaseException) -> str:
    """Return what to do after a write has failed, from the number of the OSError or of the one that caused `error`."""
    number = getattr(error if isinstance(error, OSError) else error.__cause__, "errno", None)
    if number in NO_SPACE:
        return "free some space"
    return "make the folder writable" if number in READ_ONLY else "check the folder and its disk"


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


def listing(names: Sequence[str], named: int = 3) -> str:
    """Return the number of files and the names of the first ones, as one printable line."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:named]]  # no lone surrogate either
    return f"{len(names)} file{'s' if len(names) > 1 else ''}: {', '.join(shown)}" + (
        ", …" if len(names) > named else ""
    )


def one_line(error: BaseException) -> str:
    """Return the message of an exception as one printable line of at most 300 characters."""
    line = " ".join(str(error).split())
    line = line if line.isprintable() else ascii(line)[1:-1]
    return line if len(line) <= 300 else line[:300] + "…"
