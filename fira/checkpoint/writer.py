"""Write checkpoints in the background: sharded named tensors, JSON documents and files, by all ranks.

    training thread                          background thread of each rank
    start     copy the tensors           →   [1] write this rank's files to the temporary folder, synced
    continue  exchange size and hash     →   [2] rank 0 writes index and manifest and publishes the folder;
                                                 then all ranks check the older checkpoints that are to be kept
    continue  exchange what is damaged   →   [3] rank 0 removes older checkpoints
    continue  the save is complete

Only the training thread communicates, so that all ranks call all collectives in the same order. The next
phase begins after a training step whose results show that all ranks have completed their part, or in `finish`.
`shard_index.py` and `manifest.py` define the files, `step_folders.py` their publication, and `shards.py` reads them.
"""

import logging
import os
import platform
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from fira.checkpoint.manifest import (
    INDEX,
    MANIFEST,
    FileRecord,
    Manifest,
    encode_json,
    encode_manifest,
    is_plain,
)
from fira.checkpoint.ranks import gather, gather_results, this_rank, world_size
from fira.checkpoint.shard_index import FileIndex, TensorShard, describe
from fira.checkpoint.shards import check_share
from fira.checkpoint.step_folders import older_folders, partial_folder, prune, publish, step_folders, step_name
from fira.checkpoint.tensor_file import TensorFile
from fira.errors import UserError
from fira.files import sync, write, write_remedy
from pipeline.mpi.activity import doing

T = TypeVar("T")
logger = logging.getLogger(__name__)

NICENESS = 10  # of the background thread, so that it preferably runs while the training thread waits


class CheckpointWriter:
    """Writes the checkpoints of a run to `root`, one at a time. All ranks call the methods in the same order.

    keep: number of undamaged checkpoints that remain. step: of the save in progress, or None. last: the folder of the
    checkpoint that was completed last, or None. A save that fails raises the same UserError on all ranks in the method
    that continues it; the checkpoints before it remain.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self.step: int | None = None
        self.last: Path | None = None
        self._files = {kind: TensorFile() for kind in ("model", "optimizer")}
        self._index: FileIndex | None = None  # of the last save, since that of the next one is usually the same
        self._checked: set[Path] = set()  # checkpoints that were checked after they were written
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_lower_priority)
        self._phases: Iterator[Future[Any]] = iter(())
        self._work: Future[Any] | None = None  # this rank's part of the current phase

    def start(
        self,
        step: int,
        weights: list[TensorShard],
        optimizer: list[TensorShard],
        documents: dict[str, dict[str, Any]],
        files: dict[str, bytes],
        layout: dict[str, Any],
    ) -> None:
        """Copy the tensors and begin to write `root/step-NNNNNN`. A save in progress is completed first.

        Every rank passes the shards that it owns; over all ranks, each row of a tensor is passed exactly once.
        `documents` (`{"config": {...}}` becomes `config.json`), `files` (`{"tokenizer.json": b"..."}`) and `layout` are
        taken from rank 0. Raises ValueError on every rank if rows are missing or passed twice.
        """
        self.finish()
        contents = {f"{name}.json": encode_json(document) for name, document in documents.items()} | files
        if invalid := [name for name in contents if not is_plain(name) or name in (INDEX, MANIFEST)]:
            raise ValueError(f"invalid names of checkpoint files: {invalid}")
        self.step = step
        self._phases = self._save(step, {"model": weights, "optimizer": optimizer}, contents, layout)
        self._continue()

    def finished(self) -> float:
        """Return 1 if this rank has completed its part of the current phase of a save, otherwise 0."""
        return float(self._work is not None and self._work.done())

    def advance(self, finished: float) -> None:
        """Continue the save if all ranks have completed the phase. finished: the sum of `finished` over all ranks."""
        if self._work is not None and finished == world_size():
            self._continue()

    def finish(self) -> None:
        """Complete the save in progress, if any."""
        while self._work is not None:
            with doing(f"saving step {self.step}"):
                wait([self._work])
            self._continue()

    def discard(self) -> None:
        """Abandon the save in progress, if any. A later save removes its temporary folder."""
        if self._work is not None:
            wait([self._work])
        self._phases, self._work, self.step = iter(()), None, None

    def _continue(self) -> None:
        step, self.step, self._work = self.step, None, None  # in case the save fails
        with doing(f"saving step {step}"):
            self._work = next(self._phases, None)
        if self._work is not None:
            self.step = step

    def _save(
        self, step: int, shards: dict[str, list[TensorShard]], contents: dict[str, bytes], layout: dict[str, Any]
    ) -> Iterator[Future[Any]]:
        """Save in phases: yield this rank's background work of each, and exchange the results (collective)."""
        partial = partial_folder(self.root, step)
        if this_rank() == 0 and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
        described = gather({kind: [describe(shard) for shard in owned] for kind, owned in shards.items()})
        if self._index is None or self._index.described != described:
            self._index = FileIndex(described)
        names, contents[INDEX] = self._index.names, self._index.text
        for kind, owned in shards.items():
            self._files[kind].copy_from({shard.name: shard.tensor for shard in owned})
        owned_files = {partial / names[kind][this_rank()]: self._files[kind] for kind in shards if shards[kind]}
        try:
            yield (writing := self._thread.submit(_write_files, partial, owned_files))
            written = gather_results(lambda: (_result(writing), older_folders(self.root, step)))
            records = {name: record for (records, _), _ in written for name, record in records.items()}
            if bad := [name for (_, name), _ in written if name is not None]:
                raise UserError(
                    f"{bad[0]} contains numbers that are not finite; "
                    "resume from an earlier checkpoint with a lower --lr or --clip and --override"
                )
            unchecked = [f for f in written[0][1][: max(self.keep - 1, 0)] if f not in self._checked]

            def publish_and_check() -> set[Path]:
                if this_rank() == 0:
                    _complete(partial, contents, step, layout, records)
                    publish(self.root, step)
                return {folder for folder in unchecked if _is_damaged(folder)}

            yield (publishing := self._thread.submit(publish_and_check))
            damaged = set[Path]().union(*gather_results(lambda: _result(publishing)))
            self.last = self.root / step_name(step)
            self._checked = (self._checked | set(unchecked)) - damaged - {self.last}
            yield (pruning := self._thread.submit(_on_rank_0, lambda: prune(self.root, step, self.keep, damaged)))
            gather_results(lambda: _result(pruning))
        except UserError as error:
            _on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))  # else the next save removes the folder
            intact = gather(list(step_folders(self.root).values()))[0]
            state = f"{intact[0]} is intact" if intact else "there is no earlier checkpoint"
            raise UserError(f"checkpoint of step {step} failed: {error}; {state}") from error


def _result(work: Future[T]) -> T:
    """Return the result of this rank's background work. Raises UserError with a remedy if it could not write."""
    try:
        return work.result()
    except (OSError, UserError) as error:
        raise UserError(f"{error}; {write_remedy(error)}") from error


def _lower_priority() -> None:
    """Lower the priority of the calling thread. Other systems than Linux have no priorities of threads."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _on_rank_0(function: Callable[[], None]) -> None:
    if this_rank() == 0:
        function()


def _write_files(folder: Path, files: dict[Path, TensorFile]) -> tuple[dict[str, FileRecord], str | None]:
    """Write this rank's files and return their records by name.

    If a tensor is not finite, nothing is written and its name is returned instead.
    """
    for file in files.values():
        if (name := file.first_not_finite()) is not None:
            return {}, name
    folder.mkdir(parents=True, exist_ok=True)
    return {path.name: file.write(path) for path, file in files.items()}, None


def _complete(
    folder: Path, contents: dict[str, bytes], step: int, layout: dict[str, Any], records: dict[str, FileRecord]
) -> None:
    """Write the files of rank 0 and the manifest. records: of the other files."""
    for name, content in contents.items():
        write(folder / name, content)
    files = records | {name: FileRecord.of(content) for name, content in contents.items()}
    write(folder / MANIFEST, encode_manifest(Manifest(step, layout, files), **_environment()))
    sync(folder)


def _is_damaged(folder: Path) -> bool:
    """Return whether this rank's share of the files of an older checkpoint is damaged, and log what is."""
    try:
        check_share(folder)
    except UserError as error:
        logger.warning("%s; it does not count as one of the checkpoints kept", error)
        return True
    return False


def _environment() -> dict[str, Any]:
    """Return the thread count and the versions of libraries, which influence results in addition to the layout."""
    versions = {name: version(name) for name in ("torch", "safetensors", "numpy", "mpi4py")}
    return {"threads": torch.get_num_threads(), "versions": {"python": platform.python_version(), **versions}}
