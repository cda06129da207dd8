"""What is known of each stage from earlier runs: the file stages/NAME.json in the folder of a recipe.

A stage has a key: the hash of its command and flags, of the files that they name, outputs of earlier stages included,
and of the versions of Fira and Python. Its record is written when it starts, and completed with the hash of its output.

| state | key of the record | hash of the output |
|---|---|---|
| done | that of the stage | that of the record |
| started | that of the stage | not in the record: the stage was interrupted |
| changed | another one | another one: the file or folder was changed or removed |
| new | no record | |
"""

import json
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path

from fira.checkpoint.step_folders import preferred_folders
from fira.data.cache import cache_folder, content_key
from fira.errors import UserError
from fira.files import errors_naming, replace
from fira.json_reader import integer, nullable, number, read, record, text
from fira.metrics.csv_log import LOG_NAME
from fira.recipes.recipe_file import OLD, Recipe, Stage
from fira.training.finish_marker import FINISHED

FORMAT = 1  # part of the key; increment it when the same stage yields another result
FOLDER = "stages"
PARTIAL = "partial"  # in FOLDER: where commands write that do not resume
SCHEMA = record({"key": text(), "output": nullable(text()), "seconds": number(), "ranks": integer()})


class State(StrEnum):
    """See the table above."""

    NEW, STARTED, CHANGED, DONE = "new", "started", "changed", "done"


@dataclass(frozen=True)
class StageRecord:
    """key, output: hashes; output is None until the stage has ended. seconds: of all attempts that were not killed."""

    key: str
    output: str | None
    seconds: float
    ranks: int


def record_path(recipe: Recipe, stage: Stage) -> Path:
    return recipe.out / FOLDER / f"{stage.name}.json"


def read_record(recipe: Recipe, stage: Stage) -> StageRecord | None:
    """The record of a stage; None if it has never been started. Raises UserError for a damaged file."""
    path = record_path(recipe, stage)
    if not path.exists():
        return None
    document = read(path, SCHEMA)
    return StageRecord(**{name: document[name] for name in StageRecord.__dataclass_fields__})


def write_record(recipe: Recipe, stage: Stage, entry: StageRecord) -> None:
    path = record_path(recipe, stage)
    with errors_naming(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(asdict(entry), indent=1).encode() + b"\n")


def state_of(recipe: Recipe, stage: Stage) -> State:
    """The state of a stage, whose earlier stages are as they are now."""
    found = read_record(recipe, stage)
    if found is None:
        return State.NEW
    if found.key != stage_key(recipe, stage):
        return State.CHANGED
    if found.output is None:
        return State.STARTED
    return State.DONE if found.output == content_hash(recipe.output(stage.name)) else State.CHANGED


def stage_key(recipe: Recipe, stage: Stage) -> str:
    """The hash of everything that determines the output of a stage."""
    named = [content_hash(path) for value in stage.texts() for path in _paths(recipe.resolve(value))]
    settings = [FORMAT, version("fira"), platform.python_version(), stage.command, stage.flags, named]
    return content_key(cache_folder(), [], settings, progress=False)


def _paths(value: str) -> Iterator[Path]:
    """Yield the existing files and folders that a value names, as in A=0.7,B=0.3."""
    for part in value.split(","):
        for path in (part, part.rpartition("=")[0]):
            if path and Path(path).exists():
                yield Path(path)


def content_hash(path: Path) -> str | None:
    """The hash of a file, of all files in a folder, or of the newest checkpoint of a run; None if there is nothing.

    Of the other files of a run, only the presence counts: its log has times, which differ if the run is repeated.
    """
    folder = next(iter(preferred_folders(path / "checkpoints")), None) if (path / "checkpoints").is_dir() else path
    if folder is None:
        return None
    files = [folder] if folder.is_file() else sorted(found for found in folder.rglob("*") if found.is_file())
    names = [str(file.relative_to(path)) for file in files]
    if folder != path:
        names += [name for name in (FINISHED, LOG_NAME) if (path / name).is_file()]
    return content_key(cache_folder(), files, names, progress=False) if files else None


def begin(recipe: Recipe, stage: Stage, ranks: int) -> State:
    """Write the record of a stage that starts, and return its state before.

    An output that the stage had with another key is kept as NAME.old, but an incomplete one does not replace a complete
    one there. Raises UserError if there is an output without record.
    """
    state, output = state_of(recipe, stage), recipe.output(stage.name)
    if state is State.NEW and output.exists():
        raise UserError(f"{output} exists, and no run of this recipe wrote it; move it away, or give another --out")
    with errors_naming(output):
        if state is State.CHANGED and output.exists():
            found, old = read_record(recipe, stage), output.with_name(f"{output.name}{OLD}")
            if found and found.output is None and old.exists():
                _remove(output)
            else:
                _remove(old)
                output.rename(old)
        _remove(partial_output(recipe, stage).parent)
        partial_output(recipe, stage).parent.mkdir(parents=True)
    before = read_record(recipe, stage) if state is State.STARTED else None
    seconds = before.seconds if before else 0.0
    write_record(recipe, stage, StageRecord(stage_key(recipe, stage), None, seconds, ranks))
    return state


def partial_output(recipe: Recipe, stage: Stage) -> Path:
    """Where a command writes that does not resume. It is renamed to the output of the stage at the end."""
    return recipe.out / FOLDER / PARTIAL / stage.name


def complete(recipe: Recipe, stage: Stage, started: float) -> StageRecord:
    """Write the record of a stage that has ended, and return it. started: in `time.monotonic()`."""
    output, partial = recipe.output(stage.name), partial_output(recipe, stage)
    with errors_naming(output):
        if partial.exists():
            _remove(output)
            partial.rename(output)
    if not output.exists():
        raise UserError(f"stage {stage.name}: {output} was removed; run the same command again")
    return _add_time(recipe, stage, started, content_hash(output))


def interrupt(recipe: Recipe, stage: Stage, started: float) -> StageRecord:
    """Write the record of a stage that a signal has ended, and return it. started: in `time.monotonic()`."""
    return _add_time(recipe, stage, started, None)


def _add_time(recipe: Recipe, stage: Stage, started: float, output: str | None) -> StageRecord:
    found = read_record(recipe, stage)
    if found is None:
        raise UserError(f"stage {stage.name}: {record_path(recipe, stage)} was removed; run the same command again")
    ended = StageRecord(found.key, output, found.seconds + time.monotonic() - started, found.ranks)
    write_record(recipe, stage, ended)
    return ended


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
