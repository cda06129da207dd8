"""The run folder: config.toml, data.json, training_log.csv, training_progress.png and checkpoints/."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from fira.checkpoint.step_folders import find
from fira.errors import UserError
from fira.metrics.csv_log import LOG_NAME
from fira.training.config import TrainConfig

RUNS = Path("runs")
CONFIG_NAME = "config.toml"
T = TypeVar("T")


def _broadcast(value: T) -> T:
    """Return rank 0's value on all ranks."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def choose(config: TrainConfig) -> Path:
    """Choose the run folder, the same on all ranks (collective).

    Without --out it is a new folder `runs/<model>`, `runs/<model>-2`, …, or with --resume auto the newest of these.
    Raises UserError if the folder already contains a run and --resume is not given, so that no run is overwritten.
    """
    earlier = sorted(_numbered(config.name())) if dist.get_rank() == 0 else []
    if config.out is not None:
        out = Path(config.out)
    elif config.resume == "auto" and earlier:
        out = earlier[-1][1]
    else:
        number = earlier[-1][0] + 1 if earlier else 1
        out = RUNS / (config.name() if number == 1 else f"{config.name()}-{number}")
    out = _broadcast(out)
    if config.resume is None and _broadcast((out / LOG_NAME).exists()):
        raise UserError(
            f"--out {out} already contains a run; add --resume auto to continue it, or choose another folder"
        )
    return out


def _numbered(model: str) -> list[tuple[int, Path]]:
    """Return number and path of each run folder of a model in runs/."""
    pattern = re.compile(re.escape(model) + r"(?:-(\d+))?")
    matches = ((pattern.fullmatch(path.name), path) for path in RUNS.glob(f"{model}*") if path.is_dir())
    return [(int(match[1] or 1), path) for match, path in matches if match]


def precision(config: TrainConfig, out: Path) -> str:
    """The given precision; for "auto", that of the run that --resume continues, if its folder states it (collective).

    A run therefore keeps its precision when it continues on other devices. out: the run folder of this run.
    """
    if config.precision != "auto" or config.resume is None:
        return config.precision
    resumed = out if config.resume == "auto" else find(config.resume).parent.parent
    return _broadcast(_stored_precision(resumed / CONFIG_NAME) or config.precision)


def _stored_precision(path: Path) -> str | None:
    """The precision in the config.toml of a run; None if there is no readable file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")).get("precision")
    except (OSError, ValueError):
        return None


def create(out: Path, config: TrainConfig, summary: dict[str, Any]) -> None:
    """Create the folder and write config.toml and data.json. Called by one rank only.

    summary: the counts and baselines of the corpus. Raises UserError if the folder is not writable.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG_NAME).write_text(config.to_toml(), encoding="utf-8")
        baselines = {name: summary[name] for name in ("unigram", "trigram") if summary.get(name) is not None}
        (out / "data.json").write_text(json.dumps({**summary, "baselines": baselines}, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose a writable folder") from None
