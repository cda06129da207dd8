"""Save and read checkpoints: sharded named tensors, JSON documents and files, written by all ranks.

    rank r   TensorShard(name, tensor = rows [start, start + rows) of the global tensor)  →  model-*.safetensors
    rank 0   index.json, documents and files; then manifest.json; then the folder is renamed
    reader   Checkpoint.read(name, start, stop)  ←  the files that store these rows

A checkpoint can be read by any layout. `manifest.py` defines its files and `step_folders.py` its publication.
Where `torch.distributed` is initialised, `save_checkpoint`, `Checkpoint.open` and `newest_valid` are collective: all
ranks call them, and an error on one rank raises the same UserError on all.
"""

import logging
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
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
    encode_index,
    encode_json,
    encode_manifest,
    is_plain,
    read_index,
    read_manifest,
)
from fira.checkpoint.ranks import collective_errors, gather, this_rank, world_size
from fira.checkpoint.step_folders import find, partial_folder, preferred_folders, publish, step_folders, step_name
from fira.errors import UserError
from fira.files import errors_naming, read, sync, write
from fira.json_reader import anything, mapping, parse

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorShard:
    """The rows of a tensor that a rank owns.

    name: global, independent of the layout (`layers.3.moe.experts.w1`, `exp_avg/layers.3.moe.experts.w1`).
    tensor: the rows, on any device. start: the index of the first row in dimension 0. shape: the global shape.
    An unsharded tensor has start 0 and shape `tensor.shape`; a 0-d tensor counts as one row.
    """

    name: str
    tensor: Tensor
    start: int
    shape: tuple[int, ...]


def save_checkpoint(
    root: Path,
    step: int,
    weights: list[TensorShard],
    optimizer: list[TensorShard],
    documents: dict[str, dict[str, Any]],
    files: dict[str, bytes],
    layout: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint `root/step-NNNNNN` (collective) and return its folder.

    Every rank passes the shards that it owns; over all ranks, each row of a tensor is passed exactly once. `documents`
    (`{"config": {...}}` becomes `config.json`), `files` (`{"tokenizer.json": b"..."}`) and `layout` are taken from rank
    0. Afterwards all but the newest `keep - 1` older checkpoints are removed. Raises ValueError on every rank if
    rows are missing or passed twice, and UserError on every rank if a file cannot be written; existing checkpoints
    remain.
    """
    shards = {"model": weights, "optimizer": optimizer}
    described = gather({kind: [_describe(shard) for shard in owned] for kind, owned in shards.items()})
    names = {kind: _file_names(kind, [len(kinds[kind]) for kinds in described]) for kind in shards}
    entries = _index(described, names)
    contents = {f"{name}.json": encode_json(document) for name, document in documents.items()} | files
    if invalid := [name for name in contents if not is_plain(name) or name in (INDEX, MANIFEST)]:
        raise ValueError(f"invalid names of checkpoint files: {invalid}")
    partial = partial_folder(root, step)
    try:
        with collective_errors():
            if this_rank() == 0:
                _make_empty(partial)
        with collective_errors():
            owned_files = {partial / names[kind][this_rank()]: owned for kind, owned in shards.items() if owned}
            records = _write_shards(owned_files)
        all_records = {name: record for rank_records in gather(records) for name, record in rank_records.items()}
        with collective_errors():
            if this_rank() == 0:
                for name, content in (contents | {INDEX: encode_index(entries)}).items():
                    write(partial / name, content)
                    all_records[name] = FileRecord.from_file(partial / name)
                write(partial / MANIFEST, encode_manifest(Manifest(step, layout, all_records), **_environment()))
                sync(partial)
                publish(root, step, keep)
    except UserError as error:
        if this_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # if this fails, the next save removes the folder
        intact = gather(list(step_folders(root).values()))[0]
        state = f"{intact[0]} is intact" if intact else "there is no earlier checkpoint"
        remedy = "free some space, or make the folder writable"
        raise UserError(f"checkpoint of step {step} failed: {error}; {remedy}; {state}") from error
    return root / step_name(step)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _describe(shard: TensorShard) -> tuple[str, str, tuple[int, ...], int, int]:
    """Return name, dtype, global shape, first row and number of rows."""
    rows = shard.tensor.shape[0] if shard.tensor.dim() else 1
    if tuple(shard.tensor.shape[1:]) != tuple(shard.shape[1:]) or shard.tensor.dim() != len(shard.shape):
        raise ValueError(
            f"{shard.name}: shape {tuple(shard.tensor.shape)} does not fit the global shape {tuple(shard.shape)}"
        )
    return shard.name, str(shard.tensor.dtype).removeprefix("torch."), tuple(shard.shape), shard.start, rows


def _file_names(kind: str, counts: list[int]) -> dict[int, str]:
    """Return the file name of each rank that has tensors of this kind, such as model-00001-of-00004.safetensors."""
    writers = [rank for rank, count in enumerate(counts) if count]
    return {rank: f"{kind}-{i:05d}-of-{len(writers):05d}.safetensors" for i, rank in enumerate(writers, 1)}


def _index(described: list[dict[str, list[Any]]], names: dict[str, dict[int, str]]) -> dict[str, TensorEntry]:
    """Return the index of all ranks' tensors. Raises ValueError unless each row is passed exactly once."""
    entries: dict[str, TensorEntry] = {}
    for rank, kinds in enumerate(described):
        for kind, shards in kinds.items():
            for name, dtype, shape, start, rows in shards:
                entry = entries.setdefault(name, TensorEntry(shape, dtype, ()))
                stored = StoredRows(names[kind][rank], start, rows)
                if (entry.shape, entry.dtype) != (shape, dtype) or stored.file in (part.file for part in entry.parts):
                    raise ValueError(f"{name}: rank {rank} passes it twice, or with a different shape or dtype")
                entries[name] = TensorEntry(shape, dtype, (*entry.parts, stored))
    for name, entry in entries.items():
        if not entry.is_complete():
            raise ValueError(f"{name}: the shards of all ranks do not form the tensor: {entry}")
    return entries


def _write_shards(files: dict[Path, list[TensorShard]]) -> dict[str, FileRecord]:
    """Write the shards of each file, and return the files' records by name."""
    for path, shards in files.items():
        tensors = {shard.name: shard.tensor.detach().cpu().contiguous() for shard in shards}
        with errors_naming(path):
            save_file(tensors, path, metadata={"format": "pt"})
            path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors creates files that only the owner can read
        sync(path)
    return {path.name: FileRecord.from_file(path) for path in files}


def _environment() -> dict[str, Any]:
    """Return the thread count and the versions of libraries, which influence results in addition to the layout."""
    versions = {name: version(name) for name in ("torch", "safetensors", "numpy", "mpi4py")}
    return {"threads": torch.get_num_threads(), "versions": {"python": platform.python_version(), **versions}}


class Checkpoint:
    """A checkpoint in which all files match their SHA-256. Created by `Checkpoint.open`; reading is not collective."""

    def __init__(self, folder: Path, manifest: Manifest, index: dict[str, TensorEntry]) -> None:
        self.folder = folder
        self.step = manifest.step
        self._files = manifest.files
        self._index = index
        self._opened: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Check every file of `folder`, divided over the ranks (collective), and open it.

        Raises UserError with the name of the file on every rank if a file is missing, damaged or incomplete.
        """
        folder = Path(folder)
        with collective_errors():
            manifest = read_manifest(folder)
            for name in sorted(manifest.files)[this_rank() :: world_size()]:
                manifest.files[name].check(folder / name)
        with collective_errors():
            return cls(folder, manifest, read_index(folder, manifest))

    def document(self, name: str) -> dict[str, Any]:
        """Return the JSON document `name`."""
        return parse(self.file(f"{name}.json"), self.folder / f"{name}.json", mapping(anything))

    def tensor_count(self) -> int:
        """Return the number of stored tensors."""
        return len(self._index)

    def has_file(self, name: str) -> bool:
        """Return whether the checkpoint contains the file `name`."""
        return name in self._files

    def file(self, name: str) -> bytes:
        """Return the content of the file `name`. Raises UserError if there is none."""
        if name not in self._files:
            raise UserError(f"{self.folder} has no {name}")
        return read(self.folder / name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the global shape of a tensor."""
        return self._entry(name).shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop) of a tensor (default: all) to the CPU, from the files that store them."""
        entry = self._entry(name)
        total = entry.shape[0] if entry.shape else 1
        stop = total if stop is None else stop
        if not 0 <= start <= stop <= total:
            raise ValueError(f"{name} has rows 0 to {total}, not {start} to {stop}")
        rows = torch.empty((stop - start, *entry.shape[1:]), dtype=DTYPES[entry.dtype])
        for part in entry.parts:
            low, high = max(start, part.start), min(stop, part.start + part.rows)  # rows of the global tensor
            if low < high:
                stored = self._read_rows(part, name, low - part.start, high - part.start)
                target = rows[low - start : high - start]
                if (stored.shape, stored.dtype) != (target.shape, target.dtype):
                    raise UserError(f"{self.folder / part.file}: {name} does not have the shape and dtype in {INDEX}")
                target.copy_(stored)
        return rows if entry.shape else rows.squeeze(0)

    def _read_rows(self, part: StoredRows, name: str, low: int, high: int) -> Tensor:
        """Read rows [low, high) of the rows of a tensor that one file stores."""
        path = self.folder / part.file
        with errors_naming(path):
            if part.file not in self._opened:
                self._opened[part.file] = safe_open(path, framework="pt")
            stored = self._opened[part.file].get_slice(name)
            if not stored.get_shape():
                return self._opened[part.file].get_tensor(name).unsqueeze(0)
            return stored[low:high] if stored.get_shape()[0] == part.rows else stored[:0]

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._index:
            raise UserError(f"{self.folder} has no tensor {name}; it is a checkpoint of another model")
        return self._index[name]


def newest_valid(root: Path) -> Checkpoint | None:
    """Open the first undamaged of `preferred_folders` (collective). Returns None if `root` has no checkpoint.

    Rank 0 logs a warning for each damaged checkpoint that is skipped. Raises UserError if all checkpoints
    are damaged, because only the user can decide to start from the beginning.
    """
    damaged = []
    for folder in gather(preferred_folders(root))[0]:
        try:
            checkpoint = Checkpoint.open(folder)
        except UserError as error:
            damaged.append(str(error))
            continue
        if this_rank() == 0:
            for line in damaged:
                logger.warning("%s; using %s instead", line, folder.name)
        return checkpoint
    if damaged:
        raise UserError(
            f"all checkpoints in {root} are damaged: {'; '.join(damaged)}; move the folder to start from the beginning"
        )
    return None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a step folder, or the first undamaged checkpoint of a run or `checkpoints` folder (collective).

    Raises UserError if there is none.
    """
    folder = find(path)
    checkpoint = Checkpoint.open(folder) if folder == Path(path) else newest_valid(folder.parent)
    assert checkpoint  # `find` has found one in this folder
    return checkpoint
