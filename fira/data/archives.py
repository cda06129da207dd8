"""Tar archives of texts and tables, read as a stream, compressed or not."""

import io
import logging
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from fira.data.compression import Advance, decompressed, format_of, open_bytes
from fira.data.text_encoding import HEAD, Content, content
from fira.errors import UserError
from fira.files import listing

STREAMED = (".csv", ".jsonl")  # tables that are read without seeking
OTHERS = (".parquet", ".arrow", ".tar")

log = logging.getLogger(__name__)


class _Member(io.RawIOBase):
    """The content of a member as a raw stream. tarfile has one without the attributes that io.TextIOWrapper needs."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def is_archive(path: Path) -> bool:
    """Return whether the suffix is that of a tar archive: .tar, .tar.gz, .tgz or .tar.zst."""
    return format_of(path) == ".tar"


def members(path: Path, advance: Advance) -> Iterator[tuple[str, io.BufferedReader]]:
    """Yield the name and the decompressed content of each text and table of an archive, in its order.

    Links and names that begin with a dot are ignored as in a folder; files that are not text are reported in one line
    of the log. Raises UserError for text in another encoding, for a table that cannot be read as a stream, and for an
    archive without an end. Also the content raises tarfile.TarError where the archive is damaged.
    """
    skipped = []
    with open_bytes(path, advance) as file, tarfile.open(fileobj=file, mode="r|") as archive:
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all headers
            hidden = any(part.startswith(".") for part in Path(member.name).parts)
            if hidden or not (extracted := archive.extractfile(member) if member.isfile() else None):
                continue
            stream = decompressed(io.BufferedReader(_Member(extracted)), Path(member.name))
            if _is_readable(stream, path, member.name):
                yield member.name, stream
            else:
                skipped.append(member.name)
        if not _is_complete(archive):
            raise UserError(f"{path}: not a complete tar archive (no end, or data after it); download it again")
    if skipped:
        log.warning(f"{path}: skipped what is not text ({listing(skipped)})")


def _is_readable(stream: io.BufferedReader, path: Path, name: str) -> bool:
    """Return whether a member is a table or text; False if it is not text."""
    suffix = format_of(Path(name))
    if suffix in OTHERS:
        raise UserError(f"{path}: {suffix} files such as {name} cannot be read in an archive; unpack it into a folder")
    kind = Content.TEXT if suffix in STREAMED else content(stream.peek(HEAD)[:HEAD])
    if kind is Content.OTHER_TEXT:
        raise UserError(f"{path}: {name} is text, but not in UTF-8; unpack the archive, and convert it with iconv")
    return kind is Content.TEXT


def _is_complete(archive: tarfile.TarFile) -> bool:
    """Return whether the last header is an empty block, and only such blocks follow.

    tarfile takes the end of the file, and any header that is damaged, for the end of the archive.
    """
    assert archive.fileobj
    has_end = archive.fileobj.tell() - archive.offset == tarfile.BLOCKSIZE
    return has_end and not any(any(block) for block in iter(partial(archive.fileobj.read, HEAD), b""))
