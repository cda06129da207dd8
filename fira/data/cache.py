"""Cache folders named by the hash of their inputs, each created atomically."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fira.files import sync
from fira.progress_bar import progress_bar

HASH_CACHE_SIZE = 64 * 2**20  # bytes; the SHA-256 of a file of at least this size is cached
PARTIAL_LIFETIME = 7 * 24 * 3600  # seconds after which the unfinished folder of a killed process is removed


def cache_folder() -> Path:
    """Return $FIRA_CACHE, or `~/.cache/fira` where it is not set."""
    return Path(os.environ.get("FIRA_CACHE") or Path.home() / ".cache" / "fira")


def total_size(files: list[Path]) -> int:
    """Return the sum of the files' sizes in bytes."""
    return sum(path.stat().st_size for path in files)


def content_key(cache: Path, files: list[Path], settings: list[Any], progress: bool) -> str:
    """Return the SHA-256 of the settings and of every file's content and suffix, which determines its reader."""
    with progress_bar(total_size(files), "hashing the data", progress) as bar:
        contents = [(path.suffix, _content_hash(cache, path, bar)) for path in files]
    return hashlib.sha256(json.dumps([settings, contents]).encode()).hexdigest()


def _content_hash(cache: Path, path: Path, bar: tqdm) -> str:
    """Return the SHA-256 of a file's content, cached for a large file until the file changes."""
    status = path.stat()
    identity = [str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    cached = cache / "sha256" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    if status.st_size >= HASH_CACHE_SIZE and cached.exists():
        return cached.read_text()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            bar.update(len(block))
    if status.st_size >= HASH_CACHE_SIZE:
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{uuid.uuid4().hex}")
        temporary.write_text(digest.hexdigest())
        temporary.rename(cached)
    return digest.hexdigest()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Context manager that yields a temporary folder, which is synced and renamed to `folder` when the block ends.

    The temporary folder is removed when the block raises, or when another process has created `folder` meanwhile.
    """
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    for abandoned in cache.glob(".*.partial"):
        with suppress(FileNotFoundError):  # the process that owns it may finish at this moment
            if time.time() - abandoned.stat().st_mtime > PARTIAL_LIFETIME:
                shutil.rmtree(abandoned)
    temporary = cache / f".{folder.name}-{uuid.uuid4().hex}.partial"
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process created it first, with the same content
                raise
        sync(cache)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
