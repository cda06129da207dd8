"""Where text comes from: any `--data` becomes a list of files, and any file a stream of documents.

Nothing is read whole, so files may be larger than memory. To add a format, write a reader and name it in READERS.
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
from typing import TYPE_CHECKING, TextIO

from fira.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

CUT = 16_384  # characters: a text file is cut at the first blank line from here on ...
LONGEST = 65_536  # ... or, without one, at the end of a line (of any line longer than this, inside it)
FIELD_LIMIT = 2**27  # bytes in one CSV field; more means a quote that is never closed
NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def documents(data: str | None, text_column: str) -> Iterator[str]:
    """The documents of a file, a folder, a Hugging Face dataset's name, or (None) the standard library.

    Always in the same order, without blank ones. `text_column` is the column of CSV and Parquet, the key of JSONL.
    """
    found = False
    for path in input_files(data):
        try:
            for text in _reader(path)(path, text_column):
                if text and not text.isspace():
                    found = True
                    yield text
        except UnicodeDecodeError as error:
            wrong = error.object[error.start]
            raise UserError(f"{path}: byte 0x{wrong:02x} is not UTF-8; convert the file with iconv") from None
    if not found:
        raise UserError(f"{data}: no text in it; give a file or folder that has some")


def input_files(data: str | None) -> list[Path]:
    """The files that `data` stands for, sorted; a folder's binary and hidden files are left out."""
    if data is None:
        return _standard_library()
    path = Path(data)
    if path.is_dir():
        inside = (file for file in sorted(path.rglob("*")) if not _hidden(file.relative_to(path)))
        files = [file for file in inside if file.is_file() and _readable(file)]
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
    """Has the file a reader of its own, or does it begin as UTF-8 text does?"""
    if path.suffix in READERS:
        return True
    with path.open("rb") as file:
        head = file.read(8192)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a character cut at the end of `head` is no error
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _standard_library() -> list[Path]:
    """Every Python source file of the running interpreter, without tests and installed packages."""
    root = sysconfig.get_path("stdlib")
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - NOT_SOURCE)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise UserError(f"{root}: this Python comes without its source; give --data")
    return files


def _hugging_face(name: str) -> list[Path]:
    """The Arrow files into which `datasets` puts the train split of a dataset."""
    missing = f"{name}: no such file or folder"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{missing}; check the path")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{missing}; for a Hugging Face dataset's name, pip install datasets") from None
    try:
        dataset = load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{missing}, and no Hugging Face dataset with a train split ({reason})") from None
    return [Path(file["filename"]) for file in dataset.cache_files]


# Readers: (path, text column) -> documents. pyarrow's large libraries are loaded only where such files are.


def _text(path: Path, _column: str) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    with _open(path) as file:
        for line in iter(partial(file.readline, LONGEST), ""):
            lines.append(line)
            size += len(line)
            if size >= LONGEST or (size >= CUT and line.isspace()):
                yield "".join(lines)
                lines, size = [], 0
    yield "".join(lines)


def _topics(path: Path, _column: str) -> Iterator[str]:
    """The language reference, which Python carries as one dict literal: topic -> text."""
    assignment = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert isinstance(assignment, ast.Assign)
    yield from ast.literal_eval(assignment.value).values()


def _csv(path: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(FIELD_LIMIT)  # the module's default refuses a long article
    with _open(path, newline="") as file:
        rows = csv.DictReader(file)
        try:
            _require(column, rows.fieldnames or [], path)
            yield from (row[column] or "" for row in rows)  # a short row has None
        except csv.Error as error:
            raise UserError(f"{path}, near line {rows.line_num}: not CSV ({error}); mend the file") from None


def _jsonl(path: Path, key: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error}); mend the file") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: not a JSON object; each line must be one")
            _require(key, list(record), where)
            if not isinstance(record[key], str | None):
                raise UserError(f"{where}: {key!r} holds {type(record[key]).__name__}, not text; name another key")
            # JSON can spell half a surrogate pair, which is no character: "?" takes its place
            yield (record[key] or "").encode("utf-8", "replace").decode()


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _require_text(column, file.schema_arrow, path)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: no whole Parquet file ({_one_line(error)}); fetch it again") from None


def _arrow(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as memory, pa.ipc.open_stream(memory) as batches:
            _require_text(column, batches.schema, path)
            for batch in batches:
                yield from (text or "" for text in batch.column(column).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: no whole Arrow stream ({_one_line(error)}); fetch it again") from None


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".arrow": _arrow,
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


def _require_text(column: str, schema: "pa.Schema", path: Path) -> None:
    import pyarrow as pa

    _require(column, schema.names, path)
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text; name another with --text-column")


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
