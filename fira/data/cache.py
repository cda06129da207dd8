"""Results kept in folders that are named by the hash of what they were made from, and appear whole or not at all."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from fira.progress_bar import progress_bar

REMEMBERED = 64 * 2**20  # bytes from which on a file's SHA-256 is remembered
ABANDONED = 7 * 24 * 3600  # seconds after which what a killed process left behind is removed


def cache_folder() -> Path:
    """Where results are kept: $FIRA_CACHE, or a folder of the user."""
    return Path(os.environ.get("FIRA_CACHE") or Path.home() / ".cache" / "fira")


def total_size(files: list[Path]) -> int:
    """Bytes in all of them."""
    return sum(path.stat().st_size for path in files)


def content_key(cache: Path, files: list[Path], settings: list, progress: bool) -> str:
    """SHA-256 of the settings and of every file's content and suffix (which chooses its reader)."""
    with progress_bar(total_size(files), "looking at the data", progress) as bar:
        contents = [(path.suffix, _content(cache, path, bar)) for path in files]
    return hashlib.sha256(json.dumps([settings, contents]).encode()).hexdigest()


def _content(cache: Path, path: Path, bar: tqdm) -> str:
    """SHA-256 of a file's content. A large file's is remembered until the file changes: reading it is slow."""
    status = path.stat()
    identity = [str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    memory = cache / "sha256" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    if status.st_size >= REMEMBERED and memory.exists():
        return memory.read_text()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            bar.update(len(block))
    if status.st_size >= REMEMBERED:
        memory.parent.mkdir(parents=True, exist_ok=True)
        aside = memory.with_suffix(f".{uuid.uuid4().hex}")
        aside.write_text(digest.hexdigest())
        aside.rename(memory)
    return digest.hexdigest()


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """A new folder aside to fill: when the block ends it is synced and gets its name; when it raises, it goes."""
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(".*.partial"):
        with suppress(FileNotFoundError):  # its process may finish at this moment
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left)
    aside = cache / f".{folder.name}-{uuid.uuid4().hex}.partial"
    aside.mkdir()
    try:
        yield aside
        for path in [*aside.iterdir(), aside]:
            _sync(path)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same content
                raise
        _sync(cache)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
