"""Readers of data files: each yields the documents of text, or the records of a table, of one format.

Files are streamed, so that they may be larger than memory. To add a format, write a reader and register it in STREAMED,
if it reads a stream of bytes that may be decompressed or a part of an archive, or else in COLUMNAR.
"""

import ast
import codecs
import csv
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from fira.data.archives import is_archive, members
from fira.data.compression import Advance, compression_of, format_of, open_bytes
from fira.data.text_encoding import HEAD, text_encoding
from fira.errors import UserError
from fira.files import one_line

# A text file is split at the first blank line after MIN_LENGTH characters, or else at the first end of a line after
# MAX_LENGTH characters; a longer line is split inside.
MIN_LENGTH, MAX_LENGTH = 16_384, 65_536
LIMIT = 2**26  # characters in a CSV field or in a line of CSV or JSONL; a longer field means an unclosed quote
ROWS = 128  # rows of Parquet and Arrow that are converted together
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # the last bytes of an Arrow stream

Record = dict[str, Any]  # by the names of the columns of a table, or by the keys of a JSON object
Records = Iterator[tuple[str, Record]]  # each with its place, the file and the line or row
Bytes = io.BufferedReader


def read_file(path: Path, column: str, advance: Advance) -> Iterator[str]:
    """Yield the documents of a file or of an archive. Raises UserError, which names it, if it cannot be read as text.

    column: of a table, which contains the documents; the case of its name may differ.
    """
    with reading_errors(path):
        if is_archive(path):
            for name, file in members(path, advance):
                with reading_errors(path, name):
                    yield from _documents(file, f"{path}: {name}", column)
        elif format_of(path) in COLUMNAR:
            yield from _column(_table(path, column, advance), column)
        else:
            with open_bytes(path, advance) as file:
                yield from _documents(file, str(path), column)


def _documents(file: Bytes, name: str, column: str) -> Iterator[str]:
    """Yield the documents of a text or of a table. name: for messages; its suffix selects the reader."""
    suffix = format_of(Path(name))
    if suffix == ".json" and _has_json_lines(file, column):
        suffix = ".jsonl"
    if reader := STREAMED.get(suffix):
        yield from _column(reader(file, name, column), column)
    else:
        yield from (_topics if Path(name).parts[-2:] == ("pydoc_data", "topics.py") else _text)(file, name)


def _has_json_lines(file: Bytes, column: str) -> bool:
    """Whether the first line is an object with the key `column`, as of JSON Lines in a .json file."""
    line = file.peek(HEAD).partition(b"\n")[0].lower()
    return line.startswith(b"{") and json.dumps(column.lower()).encode() in line


def _column(records: Records, column: str) -> Iterator[str]:
    for where, record in records:
        text = record[_name_in(record, column)]
        if not isinstance(text, str | None):
            raise UserError(f"{where}: {column!r} holds {type(text).__name__}, not text; name another key")
        yield valid_text(text or "")


def read_records(path: Path, advance: Advance) -> Records:
    """Yield each record of a table with its place, the file and the row. Raises UserError as `read_file` does."""
    if not has_reader(path):
        formats = ", ".join([*STREAMED, *COLUMNAR])
        raise UserError(f"{path}: not a table; give a file {formats} (.jsonl: one JSON object per line)")
    with reading_errors(path):
        yield from _table(path, None, advance)


def has_reader(path: Path) -> bool:
    """Return whether the suffix of the file names a format of tables; all other files are archives or plain text."""
    return format_of(path) in (*STREAMED, *COLUMNAR)


def _table(path: Path, column: str | None, advance: Advance) -> Records:
    """Yield the records of a table, with one column, or (None) with all."""
    suffix = format_of(path)
    if suffix in STREAMED:
        with open_bytes(path, advance) as file:
            yield from STREAMED[suffix](file, str(path), column)
    elif compression_of(path):
        raise UserError(f"{path}: a {suffix} file is compressed inside; decompress the file")
    else:
        yield from COLUMNAR[suffix](path, column, advance)


@contextmanager
def reading_errors(path: Path, member: str | None = None) -> Iterator[None]:
    """Context manager that raises errors of reading as a UserError that names the file. member: of an archive."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte, encoding = error.object[error.start], error.encoding.upper()
        where = f"{path}: {member}" if member else f"{path}, line {_undecodable_line(path, error.encoding)}"
        raise UserError(f"{where}: byte 0x{byte:02x} is not {encoding}; convert the text to UTF-8 with iconv") from None
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a complete tar archive ({one_line(error)}); download it again") from None
    except OSError as error:
        if error.errno is None:  # from decompression
            raise UserError(f"{path}: damaged or incomplete ({one_line(error)}); download it again") from None
        raise UserError(f"{path}: {error.strerror or error}; check that the file can be read") from error


def _undecodable_line(path: Path, encoding: str) -> int:
    """Return the number of the first line that cannot be decoded. A decoding error has the place in a block only."""
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    with open_bytes(path) as file:
        try:
            while block := file.read(HEAD):
                line += decoder.decode(block).count("\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].decode(encoding).count("\n")
    return line


def valid_text(text: str) -> str:
    """Return a text with "?" in place of halves of surrogate pairs, which JSON can contain and are not characters."""
    return text.encode("utf-8", "replace").decode()


def _decoded(file: Bytes, name: str, newline: str | None = None) -> TextIO:
    """Return the text of a stream of bytes in the encoding of its beginning."""
    head = file.peek(HEAD)[:HEAD]
    encoding = text_encoding(head)
    if encoding is None and b"\0" in head:  # valid UTF-8, but no text
        where = f"{name}, line {head[: head.index(0)].count(10) + 1}"
        raise UserError(f"{where}: contains zero bytes, as UTF-16 without a BOM does; convert it to UTF-8 with iconv")
    return io.TextIOWrapper(file, encoding or "utf-8", newline=newline)  # decoding raises an error, with the byte


def _lines(file: TextIO, name: str) -> Iterator[str]:
    for number, line in enumerate(iter(partial(file.readline, LIMIT), ""), 1):
        if len(line) == LIMIT:
            raise UserError(f"{name}, line {number}: longer than {LIMIT:,} characters; divide the document")
        yield line


def _text(file: Bytes, name: str) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in iter(partial(_decoded(file, name).readline, MAX_LENGTH), ""):
        lines.append(line)
        size += len(line)
        if size >= MAX_LENGTH or (size >= MIN_LENGTH and line.isspace()):
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def _topics(file: Bytes, name: str) -> Iterator[str]:
    """Read the language reference of `pydoc_data/topics.py`, a dict literal from topic to text."""
    assignment = ast.parse(_decoded(file, name).read()).body[-1]
    assert isinstance(assignment, ast.Assign)
    yield from ast.literal_eval(assignment.value).values()


def _csv(file: Bytes, name: str, column: str | None) -> Records:
    csv.field_size_limit(LIMIT)  # the default limit rejects long articles
    rows = csv.DictReader(_lines(_decoded(file, name, newline=""), name), strict=True)  # else an unclosed quote passes
    try:
        if not rows.fieldnames:
            raise UserError(f"{name}: empty; give a file whose first line has the names of the columns")
        _require(column, rows.fieldnames, name)
        for row in rows:
            if None in row:
                raise csv.Error("more fields than columns; quote text that contains commas")
            yield f"{name}, line {rows.line_num}", row  # with None where the row is too short
    except csv.Error as error:
        raise UserError(f"{name}, near line {rows.line_num}: invalid CSV ({error}); correct the file") from None


def _jsonl(file: Bytes, name: str, key: str | None) -> Records:
    for number, line in enumerate(_lines(_decoded(file, name), name), 1):
        if line.isspace():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: invalid JSON ({error}); correct the file") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object; write one object per line")
        _require(key, list(record), where)
        yield where, record


def _columnar(path: Path, column: str | None, advance: Advance) -> Records:
    """Read Parquet, or a stream of Arrow batches as in the cache of `datasets`."""
    import pyarrow as pa  # here, because it is large and only these files require it

    kind, batches = ("Parquet file", _parquet) if path.suffix.lower() == ".parquet" else ("Arrow stream", _arrow)
    try:
        count = 0
        with pa.memory_map(str(path)) as file:
            for batch in batches(file, column, path, advance):
                batch.validate(full=True)  # damaged offsets would be read without an error
                selected = batch if column is None else batch.select([_name_in(batch.schema.names, column)])
                for start in range(0, len(batch), ROWS):
                    for record in selected.slice(start, ROWS).to_pylist():
                        count += 1
                        yield f"{path}, row {count}", record
    except UserError:
        raise
    except Exception as error:  # ArrowException, OSError, SystemError and others, according to the damage
        raise UserError(f"{path}: not a valid {kind} ({one_line(error)}); download it again") from None


def _parquet(file: Any, column: str | None, path: Path, advance: Advance) -> Iterator[Any]:
    """Yield the record batches of a Parquet file with the text column, or with all columns."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, page_checksum_verification=True) as table:
        _check_schema(table.schema_arrow, column, path)
        expected = table.metadata.num_rows
        rows = 0
        selected = column and [_name_in(table.schema_arrow.names, column)]
        for batch in table.iter_batches(batch_size=ROWS, columns=selected):
            yield batch
            rows += len(batch)
            advance(file.size() * len(batch) // max(expected, 1))
        if rows != expected:
            raise ValueError(f"{rows} rows instead of {expected}")


def _arrow(file: Any, column: str | None, path: Path, advance: Advance) -> Iterator[Any]:
    """Yield the record batches of an Arrow stream. Raises ValueError if it does not end with the file."""
    from pyarrow import ipc

    with ipc.open_stream(file) as stream:
        _check_schema(stream.schema, column, path)
        position = 0
        for batch in stream:
            yield batch
            advance(file.tell() - position)
            position = file.tell()
    end = file.tell()
    file.seek(max(end - len(END_OF_STREAM), 0))
    if end != file.size() or file.read() != END_OF_STREAM:
        raise ValueError("the stream does not end at the end of the file")


def _check_schema(schema: Any, column: str | None, path: Path) -> None:
    """Raise UserError if there is not exactly one such column, or if it does not contain text."""
    import pyarrow as pa

    _require(column, schema.names, path)
    if column is None:
        return
    dtype = schema.field(_name_in(schema.names, column)).type
    if pa.types.is_dictionary(dtype):  # categories of pandas
        dtype = dtype.value_type
    if not any(is_text(dtype) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise UserError(f"{path}: column {column!r} holds {dtype}, not text; name another with --text-column")


STREAMED: dict[str, Callable[[Bytes, str, str | None], Records]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
}
COLUMNAR: dict[str, Callable[[Path, str | None, Advance], Records]] = {".parquet": _columnar, ".arrow": _columnar}


def _require(column: str | None, present: Iterable[str], where: object) -> None:
    """Raise UserError if there is no such column, or if several have its name; None: if several have any name."""
    names = Counter(present)
    found = column and _name_in(names, column)
    if found and found not in names:
        raise UserError(f"{where}: no column {column!r}; name one with --text-column: {', '.join(map(repr, names))}")
    for name in [found] if found else names:
        if names[name] > 1:
            raise UserError(f"{where}: {names[name]} columns are named {name!r}; rename all but one")


def _name_in(names: Iterable[str], column: str) -> str:
    """The column among these names: itself, or the only one that differs from it in case, such as Text for text."""
    if column in names:
        return column
    similar = [name for name in names if name.lower() == column.lower()]
    return similar[0] if len(similar) == 1 else column
