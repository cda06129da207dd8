"""The manifest and the index of a checkpoint folder.

    manifest.json   step, layout, versions, size and SHA-256 of every other file, SHA-256 of the manifest itself
    index.json      shape and dtype of every tensor, and the files that store its rows
    *.safetensors   the tensors

The hashes reveal any change of a checkpoint.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from fira import files
from fira.errors import UserError
from fira.files import errors_naming
from fira.json_reader import SIZE, anything, array, check, integer, mapping, parse, read, record, scalar, text

MANIFEST = "manifest.json"
INDEX = "index.json"
FORMAT = "fira-checkpoint"
VERSION = 1
STEP_FOLDER = r"step-(\d{6,})(\.old)?"  # the name of the complete checkpoint of a step, see step_folders.py
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}

FILE_NAME = text(meaning="a file name")
MANIFEST_SCHEMA = record(
    {
        "step": integer(),
        "layout": mapping(scalar),
        "files": mapping(record({"size": integer(), "sha256": text("[0-9a-f]{64}", "a SHA-256")})),
    }
)
INDEX_SCHEMA = record(
    {
        "tensors": mapping(
            record(
                {
                    "shape": array(integer(), longest=8),
                    "dtype": text("|".join(DTYPES), f"one of {', '.join(DTYPES)}"),
                    "parts": array(record({"file": FILE_NAME, "start": integer(), "rows": integer()})),
                }
            )
        )
    }
)


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes | memoryview) -> "FileRecord":
        """Compute the record of a file with this content."""
        return cls(len(content), hashlib.sha256(content).hexdigest())

    @classmethod
    def from_file(cls, path: Path) -> "FileRecord":
        """Compute the record of the file at `path`."""
        with errors_naming(path), open(path, "rb") as file:
            return cls(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())

    def check(self, path: Path) -> None:
        """Raise UserError unless the file at `path` matches this record."""
        with errors_naming(path):
            if not path.is_file():
                raise UserError(f"{path} is missing")
            size = path.stat().st_size
        if size != self.size:
            raise UserError(f"{path} has {size} bytes, its manifest lists {self.size}; the file is damaged")
        if FileRecord.from_file(path) != self:
            raise UserError(f"{path} does not match its SHA-256; the file is damaged")


@dataclass(frozen=True)
class StoredRows:
    """Rows [start, start + rows) of a tensor, stored in `file`."""

    file: str
    start: int
    rows: int


@dataclass(frozen=True)
class TensorEntry:
    """A tensor: global shape, dtype (such as `bfloat16`) and stored rows. A 0-d tensor counts as one row.

    The field names of this class and of StoredRows are the keys of index.json.
    """

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[StoredRows, ...]

    def is_complete(self) -> bool:
        """Return whether every row is stored exactly once, in a supported dtype."""
        end = 0
        for stored in sorted(self.parts, key=lambda stored: (stored.start, stored.rows)):
            if stored.start != end or stored.rows < 0:
                return False
            end += stored.rows
        return bool(self.parts) and end == (self.shape[0] if self.shape else 1) and self.dtype in DTYPES

    def row_size(self) -> int:
        """Return the size of a row in bytes; a dimension without elements counts as one, so that none is unlimited."""
        return DTYPES[self.dtype].itemsize * math.prod(max(1, size) for size in self.shape[1:])


@dataclass(frozen=True)
class Manifest:
    """The part of a manifest that is needed to read the checkpoint; versions and thread count are informative."""

    step: int
    layout: dict[str, Any]
    files: dict[str, FileRecord]


def combined_hash(hashes: Mapping[str, str]) -> str:
    """Return the SHA-256 of the names and SHA-256 of several files."""
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def encode_json(document: Any) -> bytes:
    """Return the JSON text of a document in a checkpoint."""
    return json.dumps(document, indent=1).encode() + b"\n"


def seal(manifest: dict[str, Any]) -> bytes:
    """Return the text of `manifest.json`: the manifest and the SHA-256 of its text."""
    return encode_json({**manifest, "sha256": hashlib.sha256(encode_json(manifest)).hexdigest()})


def encode_manifest(manifest: Manifest, **environment: Any) -> bytes:
    """Return the text of `manifest.json` with informative entries about the environment."""
    return seal({"format": FORMAT, "version": VERSION, **environment, **asdict(manifest)})


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of `folder` without checking the files that it lists.

    Raises UserError if it is missing, damaged, of another program or version, or lists a file outside the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no {MANIFEST}; give a step folder or a run folder")
    raw = files.read(path, SIZE)
    document = parse(raw, path, anything)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a {FORMAT}; give a folder that Fira wrote")
    if document.get("version") != VERSION:
        raise UserError(f"{path} has format version {document.get('version')!r}; this version of Fira reads {VERSION}")
    if raw != seal({key: value for key, value in document.items() if key != "sha256"}):
        raise UserError(f"{path} does not match its SHA-256; the file is damaged")
    check(document, path, MANIFEST_SCHEMA)
    records = {name: FileRecord(entry["size"], entry["sha256"]) for name, entry in document["files"].items()}
    for name in (*records, INDEX):
        if not is_plain(name) or name not in records:
            raise UserError(f"{path}: {name!r} is missing or not a plain file name; give a folder that Fira wrote")
    manifest = Manifest(document["step"], document["layout"], records)
    named = re.fullmatch(STEP_FOLDER, folder.absolute().name)
    if named and int(named[1]) != manifest.step:
        raise UserError(f"{path} is the manifest of step {manifest.step}, in the folder of another step; restore it")
    return manifest


def is_plain(name: str) -> bool:
    """Return whether `name` is a file name without folders, which cannot refer to a file outside the checkpoint."""
    return name == PurePosixPath(name).name and "\\" not in name and name.isprintable() and name not in ("", "..")


def encode_index(entries: dict[str, TensorEntry]) -> bytes:
    """Return the text of `index.json`."""
    return encode_json({"tensors": {name: asdict(entry) for name, entry in entries.items()}})


def read_index(folder: Path, manifest: Manifest) -> dict[str, TensorEntry]:
    """Read the tensor entries by name. Raises UserError if a row is not stored exactly once."""
    path = folder / INDEX
    entries = {
        name: TensorEntry(
            tuple(entry["shape"]),
            entry["dtype"],
            tuple(StoredRows(part["file"], part["start"], part["rows"]) for part in entry["parts"]),
        )
        for name, entry in read(path, INDEX_SCHEMA)["tensors"].items()
    }
    stored: Counter[str] = Counter()
    for name, entry in entries.items():
        if not entry.is_complete() or any(part.file not in manifest.files for part in entry.parts):
            raise UserError(f"{path} does not list every row of {name} exactly once; the checkpoint is incomplete")
        for part in entry.parts:
            stored[part.file] += part.rows * entry.row_size()
    for file, size in stored.items():  # checked before memory for a tensor is allocated
        if size > manifest.files[file].size:
            raise UserError(
                f"{path} lists {size} bytes of tensors in {file}, which has {manifest.files[file].size}; restore it"
            )
    return entries
