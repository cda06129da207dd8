"""What a checkpoint folder holds, and the proof that it still holds it.

`manifest.json` gives the size and the SHA-256 of every other file and carries a hash of its own text, so that no bit of
a checkpoint can change unnoticed. `index.json` gives, for every tensor, the files that hold its rows.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from fira.errors import UserError
from fira.files import naming

MANIFEST = "manifest.json"
INDEX = "index.json"
FORMAT = "fira-checkpoint"
VERSION = 1
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the SHA-256 (hex) of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Read the file at `path` and describe it."""
        with naming(path), open(path, "rb") as file:
            return cls(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())

    def check(self, path: Path) -> None:
        """Raise UserError unless the file at `path` is the one described."""
        if not path.is_file():
            raise UserError(f"{path} is missing")
        size = path.stat().st_size
        if size != self.size:
            raise UserError(f"{path} has {size} bytes where its manifest says {self.size}")
        if FileRecord.of(path) != self:
            raise UserError(f"{path} does not match its SHA-256")


@dataclass(frozen=True)
class StoredRows:
    """Rows `start` to `start + rows` of a tensor, held by `file`."""

    file: str
    start: int
    rows: int


@dataclass(frozen=True)
class TensorEntry:
    """A tensor: its global shape, its dtype (`bfloat16`) and the parts that make it up. A 0-d tensor is one row."""

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[StoredRows, ...]

    def is_whole(self) -> bool:
        """Whether the parts hold every row exactly once, in a dtype that we store."""
        end = 0
        for part in sorted(self.parts, key=lambda part: (part.start, part.rows)):
            if part.start != end or part.rows < 0:
                return False
            end += part.rows
        return bool(self.parts) and end == (self.shape[0] if self.shape else 1) and self.dtype in DTYPES


@dataclass(frozen=True)
class Manifest:
    """What reading a checkpoint needs of its manifest; the versions and the thread count in it are for people."""

    step: int
    layout: dict[str, Any]
    files: dict[str, FileRecord]


def encode(document: Any) -> bytes:
    """JSON as it is written into a checkpoint."""
    return json.dumps(document, indent=1).encode() + b"\n"


def seal(manifest: dict[str, Any]) -> bytes:
    """The text of `manifest.json`: the manifest and the hash of its own text."""
    return encode({**manifest, "sha256": hashlib.sha256(encode(manifest)).hexdigest()})


def encode_manifest(manifest: Manifest, **surroundings: Any) -> bytes:
    """The text of `manifest.json`, with whatever else a person may want to know."""
    return seal({"format": FORMAT, "version": VERSION, **surroundings, **asdict(manifest)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`; none of the files it names has been looked at yet.

    Raises UserError where there is none, where it is another program's or another version's, where a bit of it changed,
    and where it names a file outside the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no {MANIFEST}; give a step folder or a run folder")
    with naming(path):
        raw = path.read_bytes()
    try:
        document = json.loads(raw)
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a {FORMAT}; give a folder that Fira wrote")
    if document.get("version") != VERSION:
        raise UserError(f"{path} has format version {document.get('version')!r}; this Fira reads version {VERSION}")
    if raw != seal({key: value for key, value in document.items() if key != "sha256"}):
        raise UserError(f"{path} does not match its SHA-256")
    try:
        files = {name: FileRecord(**record) for name, record in document["files"].items()}
        manifest = Manifest(document["step"], document["layout"], files)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not what format version {VERSION} says") from None
    for name in (*files, INDEX):
        if not is_plain(name) or name not in files:
            raise UserError(f"{path} names {name!r} wrongly or not at all; it is no checkpoint that Fira wrote")
    return manifest


def is_plain(name: str) -> bool:
    """Whether `name` is a file's name and no path, so that it cannot lead out of its folder."""
    return name == PurePosixPath(name).name and "\\" not in name and "\0" not in name and name not in ("", "..")


def encode_index(entries: dict[str, TensorEntry]) -> bytes:
    """The text of `index.json`."""
    return encode({"tensors": {name: asdict(entry) for name, entry in entries.items()}})


def read_index(folder: Path, manifest: Manifest) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint by name. Raises UserError where a row of one is nowhere, or in two places."""
    path = folder / INDEX
    with naming(path):
        raw = path.read_bytes()
    try:
        entries = {
            name: TensorEntry(
                tuple(entry["shape"]), entry["dtype"], tuple(StoredRows(**part) for part in entry["parts"])
            )
            for name, entry in json.loads(raw)["tensors"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path} is not what format version {VERSION} says") from None
    for name, entry in entries.items():
        if not entry.is_whole() or any(part.file not in manifest.files for part in entry.parts):
            raise UserError(f"{path} does not give every row of {name} once; the checkpoint is incomplete")
    return entries
