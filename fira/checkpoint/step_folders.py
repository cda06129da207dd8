"""The checkpoint folders of a run: naming, atomic publication and removal.

    step-000050        a complete checkpoint
    step-000100.old    a complete checkpoint that is being replaced; used as long as step-000100 does not exist
    step-000100.tmp    being written or being removed; never read
    latest             text file with the name of the checkpoint published last, from which a run continues

A folder is renamed to a name without `.tmp` after all its content is synced. A process killed at any moment therefore
leaves complete checkpoints and temporary folders that the next save removes, but no incomplete checkpoint.
"""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from fira.checkpoint.manifest import MANIFEST, STEP_FOLDER
from fira.errors import UserError
from fira.files import errors_naming, replace, sync

LATEST = "latest"


def step_name(step: int) -> str:
    """Return the folder name of a step, `step-000100`."""
    return f"step-{step:06d}"


def partial_folder(root: Path, step: int) -> Path:
    """Return the temporary folder of the checkpoint of `step`."""
    return root / f"{step_name(step)}.tmp"


def step_folders(root: Path) -> dict[int, Path]:
    """Return the published checkpoints in `root` by step, newest first (none where `root` does not exist)."""
    folders: dict[int, Path] = {}
    for folder in sorted(root.glob("step-*")):  # step-000100 sorts before step-000100.old
        match = re.fullmatch(STEP_FOLDER, folder.name)
        if match and folder.is_dir():
            folders.setdefault(int(match[1]), folder)
    return dict(sorted(folders.items(), reverse=True))


def older_folders(root: Path, step: int) -> list[Path]:
    """Return the published checkpoints before `step`, newest first."""
    return [folder for other, folder in step_folders(root).items() if other < step]


def publish(root: Path, step: int) -> None:
    """Rename the complete temporary folder of `step` and update `latest`."""
    folder = root / step_name(step)
    if folder.exists():
        replaced = folder.with_name(f"{folder.name}.old")
        if replaced.exists():
            _remove(replaced)
        os.rename(folder, replaced)
    os.rename(partial_folder(root, step), folder)
    sync(root)
    continue_from(folder)


def continue_from(folder: Path) -> None:
    """Make this checkpoint, and not a later one, the one from which its run continues."""
    replace(folder.parent / LATEST, f"{folder.name}\n".encode())
    sync(folder.parent)


def prune(root: Path, step: int, keep: int, damaged: Collection[Path]) -> None:
    """Remove temporary folders and older checkpoints.

    The checkpoint of `step`, all later ones and the newest `keep - 1` undamaged ones before it remain. A damaged one is
    removed only when that many newer ones are undamaged.
    """
    kept = set(step_folders(root).values())
    undamaged = 0
    for folder in older_folders(root, step):
        if undamaged >= keep - 1:
            kept.remove(folder)
        undamaged += folder not in damaged
    for folder in sorted(root.glob("step-*"), reverse=True):  # step-000100.tmp before step-000100
        if re.fullmatch(r"step-\d{6,}(\.old)?(\.tmp)?", folder.name) and folder not in kept:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a killed process leaves no incomplete checkpoint."""
    if not folder.name.endswith(".tmp"):
        temporary = folder.with_name(f"{folder.name}.tmp")
        if temporary.exists():
            shutil.rmtree(temporary)
        os.rename(folder, temporary)
        folder = temporary
    shutil.rmtree(folder)


def preferred_folders(root: Path) -> list[Path]:
    """Return the published checkpoints in `root` in the order in which a run continues from them.

    The checkpoint named in `latest` comes first, then those before it and those after it, newest first. Checkpoints
    after `latest` remain where a run was continued from an earlier one. Without a valid `latest`, the newest is first.
    """
    folders = step_folders(root)
    pointer = root / LATEST
    with errors_naming(pointer):
        latest = pointer.read_text(errors="replace")[:100].strip() if pointer.is_file() else ""
    last = next((step for step, folder in folders.items() if folder.name == latest), max(folders, default=0))
    return [folder for later in (False, True) for step, folder in folders.items() if (step > last) == later]


def find(path: str | Path) -> Path:
    """Return the checkpoint folder for a step folder, a `checkpoints` folder or a run folder.

    Of several checkpoints, return the first of `preferred_folders`. Raises UserError if there is none.
    `Checkpoint.open` checks the content.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    folders = preferred_folders(root)
    if not folders:
        raise UserError(f"{path}: no checkpoint here; give a run folder, a checkpoints folder or a step folder")
    return folders[0]


def run_of(path: str | Path) -> Path:
    """Return the run folder of a step folder, a `checkpoints` folder or a run folder; any other folder as it is.

    Of a file, return its folder.
    """
    path = Path(path).resolve()
    path = path.parent if path.is_file() else path
    return next((folder.parent for folder in (path, path.parent) if folder.name == "checkpoints"), path)
