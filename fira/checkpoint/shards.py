"""Checkpoints: named tensors by shards, JSON documents and files, written by all ranks, readable by any layout.

This file knows no model. A checkpoint is a folder of safetensors and JSON (`manifest.py` says what is in it,
`step_folders.py` how it comes into place). Where `torch.distributed` is initialised, `save`, `Checkpoint.open` and
`newest_valid` are collective: all ranks call them, and what fails on one rank raises the same UserError on all.
"""

import json
import logging
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fira.checkpoint.manifest import (
    DTYPES,
    INDEX,
    MANIFEST,
    FileRecord,
    Manifest,
    StoredRows,
    TensorEntry,
    encode,
    encode_index,
    encode_manifest,
    is_plain,
    read_index,
    read_manifest,
)
from fira.checkpoint.step_folders import find, partial_folder, publish, step_folders, step_name
from fira.errors import UserError
from fira.files import naming, sync, write

__all__ = ["Checkpoint", "TensorShard", "find", "newest_valid", "save"]

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorShard:
    """The rows of a tensor that a rank owns.

    name: global, the same on every layout (`layers.3.moe.experts.w1`, `exp_avg/layers.3.moe.experts.w1`).
    tensor: the rows, on any device. start: the first of them in dimension 0. shape: of the whole tensor.
    A tensor held whole has start 0 and shape `tensor.shape`; a 0-d tensor counts as one row.
    """

    name: str
    tensor: Tensor
    start: int
    shape: tuple[int, ...]


def save(
    root: Path,
    step: int,
    weights: list[TensorShard],
    optimizer: list[TensorShard],
    documents: dict[str, dict[str, Any]],
    files: dict[str, bytes],
    layout: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint `root/step-NNNNNN` (collective) and return its folder.

    Every rank passes the shards it owns, each row of a tensor exactly once over all ranks (ValueError on every rank
    otherwise). `documents` (`{"config": {...}}` becomes `config.json`), `files` (`{"tokenizer.json": b"..."}`) and
    `layout` are rank 0's. Then all checkpoints older than this one but the newest `keep - 1` are removed.
    A file that cannot be written raises UserError on every rank; the checkpoints that were there before stay.
    """
    shards = {"model": weights, "optimizer": optimizer}
    described = _gather({kind: [_describe(shard) for shard in owned] for kind, owned in shards.items()})
    names = {kind: _file_names(kind, [len(mine[kind]) for mine in described]) for kind in shards}
    entries = _index(described, names)
    contents = {f"{name}.json": encode(document) for name, document in documents.items()} | files
    if misnamed := [name for name in contents if not is_plain(name) or name in (INDEX, MANIFEST)]:
        raise ValueError(f"not names for files of a checkpoint: {misnamed}")
    partial = partial_folder(root, step)
    try:
        with _together():
            if _rank() == 0:
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir(parents=True)
        with _together():
            records = {}
            for kind, owned in shards.items():
                if owned:
                    path = partial / names[kind][_rank()]
                    _write_tensors(path, owned)
                    records[path.name] = FileRecord.of(path)
        all_records = {name: record for mine in _gather(records) for name, record in mine.items()}
        with _together():
            if _rank() == 0:
                for name, content in (contents | {INDEX: encode_index(entries)}).items():
                    write(partial / name, content)
                    all_records[name] = FileRecord.of(partial / name)
                write(partial / MANIFEST, encode_manifest(Manifest(step, layout, all_records), **_surroundings()))
                sync(partial)
                publish(root, step, keep)
    except UserError as error:
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # what stays is never read, and the next save removes it
        intact = _gather(list(step_folders(root).values()))[0]
        state = f"{intact[0]} is intact" if intact else "there was none before"
        raise UserError(f"checkpoint of step {step} failed: {error}; {state}") from error
    return root / step_name(step)


def _describe(shard: TensorShard) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, dtype, global shape, first row and number of rows."""
    rows = shard.tensor.shape[0] if shard.tensor.dim() else 1
    if tuple(shard.tensor.shape[1:]) != tuple(shard.shape[1:]) or shard.tensor.dim() != len(shard.shape):
        raise ValueError(f"{shard.name}: {tuple(shard.tensor.shape)} are no rows of a tensor {tuple(shard.shape)}")
    return shard.name, str(shard.tensor.dtype).removeprefix("torch."), tuple(shard.shape), shard.start, rows


def _file_names(kind: str, counts: list[int]) -> dict[int, str]:
    """The file of each rank that has tensors of this kind, numbered from 1 among those: model-00001-of-00004."""
    writers = [rank for rank, count in enumerate(counts) if count]
    return {rank: f"{kind}-{i:05d}-of-{len(writers):05d}.safetensors" for i, rank in enumerate(writers, 1)}


def _index(described: list[dict[str, list[Any]]], names: dict[str, dict[int, str]]) -> dict[str, TensorEntry]:
    """Where every tensor's rows will be, from what each rank described; ValueError unless each row is there once."""
    entries: dict[str, TensorEntry] = {}
    for rank, kinds in enumerate(described):
        for kind, shards in kinds.items():
            for name, dtype, shape, start, rows in shards:
                entry = entries.setdefault(name, TensorEntry(shape, dtype, ()))
                part = StoredRows(names[kind][rank], start, rows)
                if (entry.shape, entry.dtype) != (shape, dtype) or any(part.file == p.file for p in entry.parts):
                    raise ValueError(f"{name}: rank {rank} passes it twice, or with another shape or dtype than before")
                entries[name] = TensorEntry(shape, dtype, (*entry.parts, part))
    for name, entry in entries.items():
        if not entry.is_whole():
            raise ValueError(f"{name}: the ranks' shards do not make up one tensor: {entry}")
    return entries


def _write_tensors(path: Path, shards: list[TensorShard]) -> None:
    tensors = {shard.name: shard.tensor.detach().cpu().contiguous() for shard in shards}
    with naming(path):
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
    sync(path)


def _surroundings() -> dict[str, Any]:
    """What the same numbers depend on beside the layout."""
    versions = {name: version(name) for name in ("torch", "safetensors", "numpy", "mpi4py")}
    return {"threads": torch.get_num_threads(), "versions": {"python": platform.python_version(), **versions}}


class Checkpoint:
    """A checkpoint whose every file matches its SHA-256. Made by `Checkpoint.open`; reading is not collective."""

    def __init__(self, folder: Path, manifest: Manifest, index: dict[str, TensorEntry]) -> None:
        self.folder = folder
        self.step = manifest.step
        self.layout = manifest.layout
        self._files = manifest.files
        self._index = index
        self._opened: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Check every file of `folder`, the work divided over the ranks (collective), and give access to it.

        Raises UserError on every rank, naming the file, where something is missing, damaged, foreign or incomplete.
        """
        folder = Path(folder)
        with _together():
            manifest = read_manifest(folder)
        with _together():
            for name in sorted(manifest.files)[_rank() :: _world()]:
                manifest.files[name].check(folder / name)
        with _together():
            return cls(folder, manifest, read_index(folder, manifest))

    def document(self, name: str) -> dict[str, Any]:
        """The JSON document that was saved as `name`."""
        return json.loads(self.file(f"{name}.json"))

    def has_file(self, name: str) -> bool:
        """Whether a file was saved as `name`."""
        return name in self._files

    def file(self, name: str) -> bytes:
        """The content of the file that was saved as `name`."""
        if name not in self._files:
            raise UserError(f"{self.folder} holds no {name}")
        with naming(self.folder / name):
            return (self.folder / name).read_bytes()

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._index)

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape of a tensor."""
        return self._entry(name).shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` (default: all) of a tensor, on the CPU; nothing else is read, whoever wrote them."""
        entry = self._entry(name)
        total = entry.shape[0] if entry.shape else 1
        stop = total if stop is None else stop
        if not 0 <= start <= stop <= total:
            raise ValueError(f"{name} has rows 0 to {total}, not {start} to {stop}")
        rows = torch.empty((stop - start, *entry.shape[1:]), dtype=DTYPES[entry.dtype])
        for part in entry.parts:
            low, high = max(start, part.start), min(stop, part.start + part.rows)
            if low < high:
                stored = self._stored(part.file, name, low - part.start, high - part.start)
                target = rows[low - start : high - start]
                if (stored.shape, stored.dtype) != (target.shape, target.dtype):
                    raise UserError(f"{self.folder / part.file}: {name} is not what {INDEX} says")
                target.copy_(stored)
        return rows if entry.shape else rows.squeeze(0)

    def _stored(self, file: str, name: str, low: int, high: int) -> Tensor:
        """Rows `low` to `high` of what one file holds of a tensor."""
        path = self.folder / file
        with naming(path):
            if file not in self._opened:
                self._opened[file] = safe_open(path, framework="pt")
            stored = self._opened[file].get_slice(name)
            return stored[low:high] if stored.get_shape() else self._opened[file].get_tensor(name).unsqueeze(0)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._index:
            raise UserError(f"{self.folder} holds no tensor {name}; it was written by another model")
        return self._index[name]


def newest_valid(root: Path) -> Checkpoint | None:
    """The newest checkpoint below `root` that is whole (collective); None where there is no checkpoint at all.

    Each damaged one passed over is named in a line on rank 0's stderr. Raises UserError where there are checkpoints and
    all are damaged: to start anew over them is the user's decision.
    """
    damaged = []
    for folder in _gather(list(step_folders(root).values()))[0]:
        try:
            checkpoint = Checkpoint.open(folder)
        except UserError as error:
            damaged.append(str(error))
            continue
        if _rank() == 0:
            for line in damaged:
                logger.warning("%s; using %s instead", line, folder.name)
        return checkpoint
    if damaged:
        raise UserError(f"no checkpoint in {root} is whole: {'; '.join(damaged)}; move the folder away to start anew")
    return None


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * _world()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def _together() -> Iterator[None]:
    """What the user can mend and fails inside on one rank raises the same UserError on all, and none waits for it."""
    failure: Exception | None = None
    try:
        yield
    except (UserError, OSError) as error:
        failure = error
    messages = _gather(None if failure is None else str(failure) or repr(failure))
    if failures := [message for message in messages if message]:
        raise UserError(failures[0]) from failure
