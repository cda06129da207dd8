"""The folders of a run's checkpoints: which step each one is, how a new one takes its place, which ones are kept.

    step-000050        a complete checkpoint
    step-000100.old    one that its replacement pushed aside; complete, and used while step-000100 is not there
    step-000100.tmp    being written or being removed; never read
    latest             the name of the one published last

A folder gets a name without `.tmp` in one rename, after everything in it is on the disk. A kill at any moment therefore
leaves complete checkpoints and rubbish that the next save removes, never a checkpoint with a part missing.
"""

import os
import re
import shutil
from pathlib import Path

from fira.checkpoint.manifest import MANIFEST
from fira.errors import UserError
from fira.files import sync, write

LATEST = "latest"


def step_name(step: int) -> str:
    """`step-000100`"""
    return f"step-{step:06d}"


def partial_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written until it is complete."""
    return root / f"{step_name(step)}.tmp"


def step_folders(root: Path) -> dict[int, Path]:
    """Every published checkpoint below `root` by its step, newest first (none where there is no `root`)."""
    folders: dict[int, Path] = {}
    for folder in sorted(root.glob("step-*")):  # step-000100 comes before step-000100.old
        match = re.fullmatch(r"step-(\d{6,})(\.old)?", folder.name)
        if match and folder.is_dir():
            folders.setdefault(int(match[1]), folder)
    return dict(sorted(folders.items(), reverse=True))


def publish(root: Path, step: int, keep: int) -> None:
    """Give the finished partial folder of `step` its name, move `latest` to it, then remove what is no longer kept."""
    folder = root / step_name(step)
    if folder.exists():
        aside = folder.with_name(f"{folder.name}.old")
        if aside.exists():
            _remove(aside)
        os.rename(folder, aside)
    os.rename(partial_folder(root, step), folder)
    sync(root)
    pointer = root / f"{LATEST}.tmp"
    write(pointer, f"{folder.name}\n".encode())
    os.replace(pointer, root / LATEST)
    sync(root)
    _prune(root, step, keep)


def _prune(root: Path, step: int, keep: int) -> None:
    """Remove rubbish and all checkpoints older than `step` but the newest `keep - 1`; later ones are left alone."""
    folders = step_folders(root)
    older = [folder for other, folder in folders.items() if other < step]
    kept = set(folders.values()) - set(older[max(keep - 1, 0) :])
    for folder in sorted(root.glob("step-*"), reverse=True):  # step-000100.tmp comes before step-000100
        if re.fullmatch(r"step-\d{6,}(\.old)?(\.tmp)?", folder.name) and folder not in kept:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint. Renamed first, so that a kill halfway leaves nothing that looks like one."""
    if folder.suffix != ".tmp":
        doomed = folder.with_name(f"{folder.name}.tmp")
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(folder, doomed)
        folder = doomed
    shutil.rmtree(folder)


def find(path: str | Path, before: int | None = None) -> Path:
    """The checkpoint folder that a user means by `path`: a step folder, a `checkpoints` folder or a run folder.

    Of several the one that `latest` names, else the newest. With `before`, the newest of the steps below it.
    Raises UserError where there is none. Whether it is whole, `Checkpoint.open` finds out.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    folders = [folder for step, folder in step_folders(root).items() if before is None or step < before]
    if not folders:
        limit = "" if before is None else f" before step {before}"
        raise UserError(f"{path}: no checkpoint{limit} here; give a run folder, a checkpoints folder or a step folder")
    pointer = root / LATEST
    latest = pointer.read_text(errors="replace").strip() if before is None and pointer.is_file() else ""
    return next((folder for folder in folders if folder.name == latest), folders[0])
