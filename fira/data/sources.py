"""Text sources: `--data` is resolved to a list of files, which are read as a stream of documents."""

import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from fira.data.archives import is_archive
from fira.data.compression import open_bytes
from fira.data.hub_datasets import dataset_files
from fira.data.readers import has_reader, reading_errors
from fira.data.text_encoding import HEAD, Content, content
from fira.data.text_stream import TextStream
from fira.errors import UserError
from fira.files import listing

EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

log = logging.getLogger(__name__)


def documents(data: str | None, text_column: str) -> Iterator[str]:
    """Yield the documents of a file, a folder, a named Hugging Face dataset, or (None) Python's standard library.

    The order is deterministic; blank documents are skipped. `text_column` is the column of CSV and Parquet or the key
    of JSONL. Raises UserError if a file cannot be read as text or no document is found.
    """
    return iter(TextStream(data, input_files(data), text_column, lambda _: None))


def input_files(data: str | None) -> list[Path]:
    """Return the files of `data`, sorted, without a folder's binary and hidden files."""
    if data is None:
        return _standard_library()
    path = Path(data)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        return dataset_files(data)
    check_regular(path)
    if _content(path) is Content.BINARY:
        raise UserError(f"{data}: binary, not UTF-8 text; give text, a table, an archive or a folder of shards")
    return [path]


def check_regular(path: Path) -> None:
    """Raise UserError for a pipe, a device or a socket, which could block and cannot be read several times."""
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; write the data to a file, because it is read several times")


def _folder(folder: Path) -> list[Path]:
    """Return the text files in a folder, sorted. Files that are not text are reported in one line of the log.

    Raises UserError if there is no text, or text in another encoding, which would be lost if it were skipped.
    """
    kinds: dict[Content, list[Path]] = {kind: [] for kind in Content}
    for path in sorted(_visible(folder)):
        kinds[_content(path) if path.is_file() else Content.BINARY].append(path)
    texts, others, skipped = kinds[Content.TEXT], kinds[Content.OTHER_TEXT], kinds[Content.BINARY]
    if others:
        names = _listing(folder, others)
        raise UserError(f"{folder}: text not in UTF-8 ({names}); convert it with iconv, or move it out of the folder")
    if not texts:
        raise UserError(f"{folder}: no text in this folder; give one with text, tables, archives or shards")
    if skipped:
        log.warning(f"{folder}: skipped what is not text ({_listing(folder, skipped)})")
    return texts


def _visible(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, and links to folders, except for names that begin with a dot."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}; check that the folder can be read") from error

    for root, subfolders, names in os.walk(folder, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        links = [
            name for name in subfolders if os.path.islink(os.path.join(root, name))
        ]  # os.walk does not follow them
        yield from (Path(root, name) for name in links + names if not name.startswith("."))


def _listing(folder: Path, paths: list[Path]) -> str:
    return listing([str(path.relative_to(folder)) for path in paths])


def _content(path: Path) -> Content:
    """Return what a regular file contains, from its suffix if it has a reader, else from its beginning."""
    if has_reader(path) or is_archive(path):
        return Content.TEXT
    with reading_errors(path), open_bytes(path) as file:
        return content(file.read(HEAD))


def _standard_library() -> list[Path]:
    """Return every Python source file of the running interpreter, without tests and installed packages."""
    root = sysconfig.get_path("stdlib")
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - EXCLUDED_FOLDERS)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise UserError(f"{root}: the source files of this Python are missing; give --data")
    return files
