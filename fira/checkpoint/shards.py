"""Read checkpoints: each rank reads the rows that it needs from the files that store them.

    writer.py   files of all ranks, index.json, manifest.json
    reader      Checkpoint.read(name, start, stop)  ←  the files that store these rows

A checkpoint can be read by any layout. `manifest.py` defines its files and `step_folders.py` where it is found.
Where `torch.distributed` is initialised, `Checkpoint.open` and `newest_valid` are collective: all ranks call them, and
an error on one rank raises the same UserError on all.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fira.checkpoint.manifest import (
    DTYPES,
    INDEX,
    Manifest,
    StoredRows,
    TensorEntry,
    combined_hash,
    read_index,
    read_manifest,
)
from fira.checkpoint.ranks import collective_errors, gather, this_rank, world_size
from fira.checkpoint.step_folders import find, preferred_folders
from fira.errors import UserError
from fira.files import errors_naming, read
from fira.json_reader import anything, mapping, parse

logger = logging.getLogger(__name__)


def check_share(folder: Path) -> Manifest:
    """Check this rank's share of the files of a checkpoint and return its manifest.

    Raises UserError with the name of the file if one is missing or damaged.
    """
    manifest = read_manifest(folder)
    for name in sorted(manifest.files)[this_rank() :: world_size()]:
        manifest.files[name].check(folder / name)
    return manifest


class Checkpoint:
    """A checkpoint in which all files match their SHA-256. Created by `Checkpoint.open`; reading is not collective."""

    def __init__(self, folder: Path, manifest: Manifest, index: dict[str, TensorEntry]) -> None:
        self.folder = folder
        self.step = manifest.step
        self._files = manifest.files
        self._index = index
        self._opened: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: str | Path, check: "Check | None" = None) -> "Checkpoint":
        """Check every file of `folder`, divided over the ranks (collective), and open it.

        check: raises UserError if the documents are not those that the caller reads. Raises UserError with the name of
        the file on every rank if a file is missing, damaged, incomplete or refused by `check`.
        """
        folder = Path(folder)
        with collective_errors():
            manifest = check_share(folder)
        with collective_errors():
            checkpoint = cls(folder, manifest, read_index(folder, manifest))
            if check:
                check(checkpoint)
        return checkpoint

    def document(self, name: str) -> dict[str, Any]:
        """Return the JSON document `name`."""
        return parse(self.file(f"{name}.json"), self.folder / f"{name}.json", mapping(anything))

    def tensor_count(self) -> int:
        """Return the number of stored tensors."""
        return len(self._index)

    def has_tensor(self, name: str) -> bool:
        """Return whether the checkpoint contains the tensor `name`."""
        return name in self._index

    def precision(self) -> torch.dtype:
        """Return the widest dtype of the stored tensors."""
        dtypes = (DTYPES[entry.dtype] for entry in self._index.values())
        return max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)

    def weights_hash(self) -> str:
        """Return a hash of the model's config and weights, from the SHA-256 of their files."""
        names = [name for name in self._files if name == "config.json" or name.startswith("model-")]
        return combined_hash({name: self._files[name].sha256 for name in names})

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

    def close(self) -> None:
        """Close the files of tensors. Until then the disk keeps their content, even if the checkpoint is removed."""
        self._opened.clear()

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


Check = Callable[[Checkpoint], object]


def newest_valid(root: Path, check: Check | None = None) -> Checkpoint | None:
    """Open the first undamaged of `preferred_folders` (collective). Returns None if `root` has no checkpoint.

    check: see `Checkpoint.open`; a checkpoint that it refuses is a damaged one. Rank 0 logs a warning for each damaged
    checkpoint that is skipped. Raises UserError if all checkpoints are damaged, because only the user can decide to
    start from the beginning.
    """
    damaged = []
    for folder in gather(preferred_folders(root))[0]:
        try:
            checkpoint = Checkpoint.open(folder, check)
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


def open_checkpoint(path: str | Path, check: Check | None = None) -> Checkpoint:
    """Open a step folder, or the first undamaged checkpoint of a run or `checkpoints` folder (collective).

    check: see `Checkpoint.open`. Raises UserError if there is none.
    """
    folder = find(path)
    checkpoint = Checkpoint.open(folder, check) if folder == Path(path) else newest_valid(folder.parent, check)
    assert checkpoint  # `find` has found one in this folder
    return checkpoint
