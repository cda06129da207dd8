"""The run folder: config.toml, data.json, training_log.csv, training_progress.png and checkpoints/."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fira.checkpoint.ranks import collective_errors, gather, this_rank
from fira.checkpoint.step_folders import find
from fira.errors import UserError
from fira.files import replace
from fira.metrics.csv_log import LOG_NAME
from fira.training.config import CONFIG_NAME, EARLIER, INHERITED, TrainConfig
from fira.training.flags import read_settings
from fira.training.run_lock import RunLock

RUNS = Path("runs")
BASELINES = ("unigram", "trigram")  # losses in the summary of a corpus


def resumed_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that the run continued by --resume has stored in its folder, and `out` (collective).

    Rank 0 reads the folder. Without a folder or without config.toml, there are no settings.
    """
    settings: dict[str, Any] = {}
    with collective_errors():
        if this_rank() == 0:
            settings = _resumed_settings(config)
    return gather(settings)[0]


def _resumed_settings(config: TrainConfig) -> dict[str, Any]:
    if config.resume == "auto":
        earlier = sorted(_numbered(config.name()))
        run = Path(config.out) if config.out is not None else earlier[-1][1] if earlier else None
        found = {"out": str(run)} if run else {}
    else:
        root = find(str(config.resume)).absolute().parent
        run, found = (root.parent if root.name == "checkpoints" else None), {}
    if run and (run / CONFIG_NAME).is_file():
        stored = EARLIER | read_settings(run / CONFIG_NAME)
        found |= {name: stored[name] for name in INHERITED if name in stored}
    return found


@contextmanager
def claim(config: TrainConfig) -> Iterator[tuple[Path, RunLock | None]]:
    """Choose and lock the run folder, the same on all ranks (collective). Rank 0 holds the lock during the block.

    Without --out it is a new folder `runs/<model>`, `runs/<model>-2`, …. Raises UserError if another job writes to the
    folder, or if it already contains a run and --resume is not given, so that no run is overwritten.
    """
    out, lock = Path(), None
    try:
        with collective_errors():
            if this_rank() == 0:
                out = Path(config.out) if config.out is not None else new_folder(config.name())
                lock = RunLock(out)
                if config.resume is None and (out / LOG_NAME).exists():
                    raise UserError(
                        f"--out {out} already contains a run; "
                        "add --resume auto to continue it, or choose another folder"
                    )
        yield gather(out)[0], lock
    finally:
        if lock:
            lock.release()


def new_folder(model: str) -> Path:
    """Create the next run folder of a model. Of two jobs that start together, each gets its own."""
    number = max((number for number, _ in _numbered(model)), default=0)
    try:
        RUNS.mkdir(parents=True, exist_ok=True)
        while True:
            number += 1
            out = RUNS / (model if number == 1 else f"{model}-{number}")
            with suppress(FileExistsError):
                out.mkdir()
                return out
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; choose a writable folder as --out") from None


def _numbered(model: str) -> list[tuple[int, Path]]:
    """Return number and path of each run folder of a model in runs/."""
    pattern = re.compile(re.escape(model) + r"(?:-(\d+))?")
    matches = ((pattern.fullmatch(path.name), path) for path in RUNS.glob(f"{model}*") if path.is_dir())
    return [(int(match[1] or 1), path) for match, path in matches if match]


def write_settings(out: Path, config: TrainConfig, summary: dict[str, Any]) -> None:
    """Write config.toml and data.json to an existing folder. Called by one rank only.

    summary: the counts and baselines of the corpus. Raises UserError if a file cannot be written.
    """
    counts = {name: value for name, value in summary.items() if name not in BASELINES}
    baselines = {name: summary[name] for name in BASELINES if summary.get(name) is not None}
    replace(out / CONFIG_NAME, config.to_toml().encode())
    replace(out / "data.json", json.dumps({**counts, "baselines": baselines}, indent=1).encode())
