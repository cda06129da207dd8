"""Text sources: `--data` is resolved to a list of files, which are read as a stream of documents."""

import logging
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from fira.data.readers import Advance, has_reader, read_file
from fira.data.text_encoding import HEAD, Content, content
from fira.errors import UserError
from fira.files import errors_naming, one_line

EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NAMED = 3  # files that a message about several files names

log = logging.getLogger(__name__)


def documents(data: str | None, text_column: str) -> Iterator[str]:
    """Yield the documents of a file, a folder, a named Hugging Face dataset, or (None) Python's standard library.

    The order is deterministic; blank documents are skipped. `text_column` is the column of CSV and Parquet or the key
    of JSONL. Raises UserError if a file cannot be read as text or no document is found.
    """
    return read_files(data, input_files(data), text_column, lambda _: None)


def read_files(data: str | None, files: Sequence[Path], text_column: str, advance: Advance) -> Iterator[str]:
    """Yield the documents of `files`, the input files of `data`. advance: called with the number of bytes read."""
    found = False
    for path in files:
        for text in read_file(path, text_column, advance):
            if text and not text.isspace():
                found = True
                yield text
    if not found:
        raise UserError(f"{data}: contains no text; give a file or folder with text")


def input_files(data: str | None) -> list[Path]:
    """Return the files of `data`, sorted, without a folder's binary and hidden files."""
    if data is None:
        return _standard_library()
    path = Path(data)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        return _hugging_face(data)
    check_regular(path)
    if _content(path) is Content.BINARY:
        raise UserError(f"{data}: binary, not UTF-8 text; give text, CSV, JSONL, Parquet or a folder of .npy shards")
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
        raise UserError(f"{folder}: no text in this folder; give one with text, CSV, JSONL, Parquet or .npy shards")
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
    """Return the number of files and the names of the first ones."""
    names = [str(path.relative_to(folder)) for path in paths]
    names = [name if name.isprintable() else ascii(name) for name in names]  # one line, and no lone surrogate
    named = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
    return f"{len(names)} file{'s' if len(names) > 1 else ''}: {named}"


def _content(path: Path) -> Content:
    """Return what a regular file contains, from its suffix if it has a reader, else from its beginning."""
    if has_reader(path):
        return Content.TEXT
    with errors_naming(path), path.open("rb") as file:
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


def _hugging_face(name: str) -> list[Path]:
    """Return the Arrow files of a dataset's train split in the cache of `datasets`."""
    missing = f"{name}: no such file or folder"
    like_a_file = has_reader(Path(name)) or Path(name).suffix.lower() in (".txt", ".md")
    if like_a_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{missing}; check the path")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{missing}; if it is a Hugging Face dataset, pip install datasets") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no line for each attempt that fails
    try:
        dataset = load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        raise UserError(f"{missing}, and no Hugging Face dataset with a train split ({one_line(error)})") from None
    return [Path(file["filename"]) for file in dataset.cache_files]
