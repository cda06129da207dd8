"""What a model has computed for windows before training, in files that all ranks read.

FOLDER/NAME.json           the key: what the numbers depend on
FOLDER/NAME-ARRAY.npy      [windows, …] for each array; a sparse file, whose rows are written when they are needed
FOLDER/NAME-written.npy    [windows] uint8, whether a row is written
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fira import files
from fira.checkpoint.ranks import collective_errors, gather, this_rank
from fira.data.loader import Windows
from fira.data.rows import Rows
from fira.errors import UserError
from fira.files import errors_naming, one_line
from fira.progress_bar import progress_bar

WRITTEN = "written"
Compute = Callable[[Rows], Mapping[str, np.ndarray]]


class Column(NamedTuple):
    """An array of a store: shape of one row, and dtype."""

    shape: tuple[int, ...]
    dtype: Any


class WindowStore:
    """Arrays with one row per window (collective).

    The files are kept if they have the same key and the same shapes, and replaced otherwise. A process that is killed
    loses at most the rows that were computed last.
    """

    def __init__(self, folder: Path, name: str, count: int, columns: Mapping[str, Column], key: Mapping[str, Any]):
        self._paths = {column: folder / f"{name}-{column}.npy" for column in (*columns, WRITTEN)}
        self._columns = {**columns, WRITTEN: Column((), np.uint8)}
        with collective_errors():
            if this_rank() == 0:
                arrays = {column: [[count, *shape], np.dtype(dtype).name] for column, (shape, dtype) in columns.items()}
                self._create(folder / f"{name}.json", count, {**key, "arrays": arrays})
        self._open()

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of those windows that are not written, without repetitions."""
        written = self._arrays[WRITTEN]
        return [number for number in dict.fromkeys(numbers) if not written[number]]

    def fill(
        self,
        windows: Windows,
        numbers: Sequence[int],
        batch: int,
        compute: Compute,
        label: str = "",
        shown: bool = False,
    ) -> None:
        """Compute and write what is missing for these windows, in batches of `batch` (collective).

        compute: collective, returns the arrays of rows on every rank. label, shown: of the progress bar.
        """
        if not (missing := self.missing(numbers)):
            return
        gather(None)  # no rank writes before all have read what is missing
        with progress_bar(len(missing), label, shown and this_rank() == 0, " sequences") as bar:
            for first in range(0, len(missing), batch):
                part = missing[first : first + batch]
                values = compute(windows.rows(part, len(part)))
                with collective_errors():
                    if this_rank() == 0:
                        self._write(part, values)
                bar.update(len(part))
        self._open()  # a network file system shows the new rows to those that open the file after the writes

    def _write(self, numbers: Sequence[int], values: Mapping[str, np.ndarray]) -> None:
        for column, value in values.items():
            self._arrays[column][numbers] = value
            self._arrays[column].flush()
        self._arrays[WRITTEN][numbers] = 1
        self._arrays[WRITTEN].flush()

    def rows(self, numbers: Sequence[int], count: int) -> dict[str, np.ndarray]:
        """The rows of these windows, followed by zeros up to `count`. Every window must be written."""
        assert not self.missing(numbers)
        result = {}
        for column, (shape, dtype) in self._columns.items():
            if column != WRITTEN:
                result[column] = np.zeros((count, *shape), dtype)
                result[column][: len(numbers)] = self._arrays[column][numbers]
        return result

    def bytes(self) -> int:
        """The size of the rows that are written."""
        row = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self._columns.values())
        return int(self._arrays[WRITTEN].sum()) * row

    def _open(self) -> None:
        """Map the files; rank 0 can write to them (collective)."""
        with collective_errors():
            self._arrays = {column: self._map(column) for column in self._columns}

    def _create(self, path: Path, count: int, key: dict[str, Any]) -> None:
        """Create the files unless they exist with this key. The key is written last."""
        content = json.dumps(key, sort_keys=True).encode() + b"\n"
        with errors_naming(path):
            if path.is_file() and files.read(path) == content and all(file.is_file() for file in self._paths.values()):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        for column, (shape, dtype) in self._columns.items():
            with errors_naming(self._paths[column]):
                np.lib.format.open_memmap(self._paths[column], "w+", dtype, (count, *shape))
        files.replace(path, content)

    def _map(self, column: str) -> np.memmap:
        with errors_naming(self._paths[column]):
            try:
                mapped: np.memmap = np.load(self._paths[column], mmap_mode="r")
            except (ValueError, EOFError) as error:
                raise UserError(f"{self._paths[column]} is damaged ({one_line(error)}); remove it") from None
            if this_rank() == 0:  # only now, because numpy then extends a file that is too short with zeros
                mapped = np.load(self._paths[column], mmap_mode="r+")
            return mapped


class StoredWindows:
    """Windows with the arrays of a store. What is missing is computed when it is read, see `WindowStore.fill`."""

    def __init__(self, windows: Windows, store: WindowStore, compute: Compute) -> None:
        self._windows, self._store, self._compute = windows, store, compute

    def __len__(self) -> int:
        return len(self._windows)

    def rows(self, numbers: Sequence[int], count: int) -> Rows:
        """Return the windows of these numbers, followed by padding up to `count` rows."""
        self._store.fill(self._windows, numbers, len(numbers), self._compute)
        return self._windows.rows(numbers, count)._replace(stored=self._store.rows(numbers, count))
