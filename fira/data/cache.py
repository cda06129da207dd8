"""Cache folders named by the hash of their inputs, each created atomically and verified by checksums."""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fira.data.compression import suffix_of
from fira.errors import UserError
from fira.files import lock, sync
from fira.json_reader import integer, mapping, read
from fira.progress_bar import progress_bar

CHECKSUMS = "checksums.json"  # the CRC-32 of every other file of a cache folder, which costs less than SHA-256
HASH_CACHE_SIZE = 64 * 2**20  # bytes; the SHA-256 of a file of at least this size is cached
PARTIAL_LIFETIME = 7 * 24 * 3600  # seconds after which the unfinished folder of a killed process is removed

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return $FIRA_CACHE, or `~/.cache/fira` where it is not set."""
    return Path(os.environ.get("FIRA_CACHE") or Path.home() / ".cache" / "fira")


def total_size(files: list[Path]) -> int:
    """Return the sum of the files' sizes in bytes."""
    return sum(path.stat().st_size for path in files)


def content_key(cache: Path, files: list[Path], settings: list[Any], progress: bool) -> str:
    """Return the SHA-256 of the settings and of every file's content and suffix, which determines its reader."""
    with progress_bar(total_size(files), "hashing the data", progress) as bar:
        contents = [(suffix_of(path), _content_hash(cache, path, bar)) for path in files]
    return hashlib.sha256(json.dumps([settings, contents]).encode()).hexdigest()


def _content_hash(cache: Path, path: Path, bar: tqdm) -> str:
    """Return the SHA-256 of a file's content, cached for a large file until the file changes."""
    status = path.stat()
    identity = [str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    cached = cache / "sha256" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    if status.st_size >= HASH_CACHE_SIZE and cached.exists():
        text = cached.read_text(errors="replace")
        if re.fullmatch("[0-9a-f]{64}", text):
            return text
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            bar.update(len(block))
    if status.st_size >= HASH_CACHE_SIZE:
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{uuid.uuid4().hex}")
        try:
            temporary.write_text(digest.hexdigest())
            temporary.rename(cached)
        finally:
            temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def cached(cache: Path, key: str, progress: bool, write: Callable[[Path], None]) -> Path:
    """Return the folder of a key. If it is missing or damaged, `write` writes its files to a temporary folder."""
    folder = cache / key
    if folder.is_dir() and (damaged := damaged_file(folder, progress)):
        log.warning(f"{damaged}: damaged since it was written; the data are prepared again")
        remove_folder(folder)
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            write(temporary)
    return folder


def damaged_file(folder: Path, progress: bool) -> Path | None:
    """Return a file of a cache folder that is missing or differs from its checksum; None if all are as written."""
    try:
        expected = read(folder / CHECKSUMS, mapping(integer()))
    except UserError:
        return folder / CHECKSUMS
    try:
        with progress_bar(total_size(list(folder.iterdir())), "verifying the prepared data", progress) as bar:
            for name, checksum in expected.items():
                if _checksum(folder / name, bar.update) != checksum:
                    return folder / name
    except FileNotFoundError as error:
        return Path(error.filename)
    return None


def remove_folder(folder: Path) -> None:
    """Remove a cache folder in one step for other processes. Those that have mapped its files can still read them."""
    removed = folder.parent / f".{folder.name}-{uuid.uuid4().hex}.partial"
    with suppress(FileNotFoundError):  # another process has removed it
        folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _checksum(path: Path, advance: Callable[[int], object]) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
            advance(len(block))
    return checksum


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Context manager that yields a temporary folder, which is synced and renamed to `folder` when the block ends.

    The checksums of its files are written to CHECKSUMS before. The temporary folder contains what a process that was
    killed in the same block has written. It is removed when the block raises an Exception, or when another process has
    created `folder` meanwhile.
    """
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    for abandoned in cache.glob(".*.partial"):
        with suppress(FileNotFoundError):  # the process that owns it may finish at this moment
            if time.time() - abandoned.stat().st_mtime > PARTIAL_LIFETIME:
                shutil.rmtree(abandoned)
    with _own_folder(cache / f".{folder.name}.partial") as temporary:
        try:
            yield temporary
            checksums = {path.name: _checksum(path, lambda _: None) for path in sorted(temporary.iterdir())}
            (temporary / CHECKSUMS).write_text(json.dumps(checksums, indent=2) + "\n")
            for path in [*temporary.iterdir(), temporary]:
                sync(path)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process created it first, with the same content
                    raise
                shutil.rmtree(temporary)
            sync(cache)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def _own_folder(path: Path) -> Iterator[Path]:
    """Context manager that creates a folder, or locks an existing one that no other process uses, and returns it.

    If another process uses it, or if the file system has no locks, this is a new folder with another name.
    """
    path.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not _locked(descriptor, path):
            path = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.partial")
            path.mkdir()
        yield path
    finally:
        os.close(descriptor)


def _locked(descriptor: int, path: Path) -> bool:
    """Lock an open folder. Return whether no other process has locked it, or renamed or removed it before."""
    try:
        lock(descriptor)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
