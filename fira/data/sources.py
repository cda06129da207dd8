"""Text sources: `--data` is resolved to a list of files, and each file to a stream of documents.

Files are streamed, so that they may be larger than memory. To add a format, write a reader and register it in READERS.
"""

import ast
import codecs
import csv
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from fira.errors import UserError

# A text file is split at the first blank line after MIN_LENGTH characters, or else at the first end of a line after
# MAX_LENGTH characters; a longer line is split inside.
MIN_LENGTH, MAX_LENGTH = 16_384, 65_536
FIELD_LIMIT = 2**27  # characters in one CSV field; a longer one means an unclosed quote
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def documents(data: str | None, text_column: str) -> Iterator[str]:
    """Yield the documents of a file, a folder, a named Hugging Face dataset, or (None) Python's standard library.

    The order is deterministic; blank documents are skipped. `text_column` is the column of CSV and Parquet or the key
    of JSONL. Raises UserError if a file cannot be read as text or no document is found.
    """
    found = False
    for path in input_files(data):
        try:
            for text in _reader(path)(path, text_column):
                if text and not text.isspace():
                    found = True
                    yield text
        except UnicodeDecodeError as error:
            invalid = error.object[error.start]
            raise UserError(f"{path}: byte 0x{invalid:02x} is not UTF-8; convert the file with iconv") from None
    if not found:
        raise UserError(f"{data}: contains no text; give a file or folder with text")


def input_files(data: str | None) -> list[Path]:
    """Return the files of `data`, sorted, without a folder's binary and hidden files."""
    if data is None:
        return _standard_library()
    path = Path(data)
    if path.is_dir():
        visible = (file for file in sorted(path.rglob("*")) if not _hidden(file.relative_to(path)))
        files = [file for file in visible if file.is_file() and _readable(file)]
        if not files:
            raise UserError(f"{data}: no text in this folder; give one with text, CSV, JSONL, Parquet or .npy shards")
        return files
    if not path.exists():
        return _hugging_face(data)
    if not _readable(path):
        raise UserError(f"{data}: binary, not UTF-8 text; give text, CSV, JSONL, Parquet or a folder of .npy shards")
    return [path]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _readable(path: Path) -> bool:
    """Return whether the file's suffix has a reader or its beginning is UTF-8 text."""
    if path.suffix in READERS:
        return True
    with path.open("rb") as file:
        head = file.read(8192)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a character split at the end of `head` is no error
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


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
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{missing}; check the path")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{missing}; if it is a Hugging Face dataset, pip install datasets") from None
    try:
        dataset = load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        raise UserError(f"{missing}, and no Hugging Face dataset with a train split ({_one_line(error)})") from None
    return [Path(file["filename"]) for file in dataset.cache_files]


# Readers: (path, text column) -> documents. pyarrow is large, so it is imported only for files that require it.


def _text(path: Path, _column: str) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    with _open(path) as file:
        for line in iter(partial(file.readline, MAX_LENGTH), ""):
            lines.append(line)
            size += len(line)
            if size >= MAX_LENGTH or (size >= MIN_LENGTH and line.isspace()):
                yield "".join(lines)
                lines, size = [], 0
    yield "".join(lines)


def _topics(path: Path, _column: str) -> Iterator[str]:
    """Read the language reference of `pydoc_data/topics.py`, a dict literal from topic to text."""
    assignment = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert isinstance(assignment, ast.Assign)
    yield from ast.literal_eval(assignment.value).values()


def _csv(path: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(FIELD_LIMIT)  # the default limit rejects long articles
    with _open(path, newline="") as file:
        rows = csv.DictReader(file)
        try:
            _require(column, rows.fieldnames or [], path)
            yield from (row[column] or "" for row in rows)  # None where a row is too short
        except csv.Error as error:
            raise UserError(f"{path}, near line {rows.line_num}: invalid CSV ({error}); correct the file") from None


def _jsonl(path: Path, key: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: invalid JSON ({error}); correct the file") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: not a JSON object; write one object per line")
            _require(key, list(record), where)
            if not isinstance(record[key], str | None):
                raise UserError(f"{where}: {key!r} holds {type(record[key]).__name__}, not text; name another key")
            # JSON can contain half a surrogate pair, which is not a character: replace it by "?"
            yield (record[key] or "").encode("utf-8", "replace").decode()


def _columnar(path: Path, column: str) -> Iterator[str]:
    """Read Parquet, or a stream of Arrow batches as in the cache of `datasets`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parquet = path.suffix == ".parquet"
    try:
        with pa.memory_map(str(path)) as file, (pq.ParquetFile if parquet else pa.ipc.open_stream)(file) as table:
            schema = table.schema_arrow if parquet else table.schema
            _require(column, schema.names, path)
            dtype = schema.field(column).type
            if not (pa.types.is_string(dtype) or pa.types.is_large_string(dtype)):
                raise UserError(f"{path}: column {column!r} holds {dtype}, not text; name another with --text-column")
            for batch in table.iter_batches(batch_size=1024, columns=[column]) if parquet else table:
                yield from (text or "" for text in batch.column(column).to_pylist())
    except (pa.ArrowException, OSError) as error:
        kind = "Parquet file" if parquet else "Arrow stream"
        raise UserError(f"{path}: not a valid {kind} ({_one_line(error)}); download it again") from None


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _columnar,
    ".arrow": _columnar,
}


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]]:
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        return _topics
    return READERS.get(path.suffix, _text)


def _open(path: Path, newline: str | None = None) -> TextIO:
    return path.open(encoding="utf-8-sig", newline=newline)


def _require(column: str, present: Iterable[str], where: object) -> None:
    if column not in present:
        raise UserError(f"{where}: no column {column!r}; name one with --text-column: {', '.join(map(repr, present))}")


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
