"""The folder a run leaves: config.toml, data.json, training_log.csv, training_progress.png, checkpoints/."""

import json
import re
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fira.errors import UserError
from fira.training.config import TrainConfig

RUNS = Path("runs")


def _on_all(value: Any) -> Any:
    """Rank 0's value."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def choose(config: TrainConfig) -> Path:
    """The run folder, the same on all ranks (collective).

    Without --out it is a new `runs/<model>`, `runs/<model>-2`, …; with --resume auto the newest of these. A folder that
    already holds a run is only taken with --resume: nothing is overwritten.
    """
    earlier = sorted(_numbered(config.name())) if dist.get_rank() == 0 else []
    if config.out is not None:
        out = Path(config.out)
    elif config.resume == "auto" and earlier:
        out = earlier[-1][1]
    else:
        number = earlier[-1][0] + 1 if earlier else 1
        out = RUNS / (config.name() if number == 1 else f"{config.name()}-{number}")
    out = _on_all(out)
    if config.resume is None and _on_all((out / "training_log.csv").exists()):
        raise UserError(f"--out {out} already holds a run; add --resume auto to continue it, or choose another folder")
    return out


def _numbered(model: str) -> list[tuple[int, Path]]:
    """The run folders of a model under runs/, with their numbers."""
    pattern = re.compile(re.escape(model) + r"(?:-(\d+))?")
    found = ((pattern.fullmatch(path.name), path) for path in RUNS.glob(f"{model}*") if path.is_dir())
    return [(int(match[1] or 1), path) for match, path in found if match]


def describe(out: Path, config: TrainConfig, summary: dict[str, Any]) -> None:
    """Create the folder and write config.toml and data.json; one rank calls it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        baselines = {name: summary[name] for name in ("unigram", "trigram") if summary.get(name) is not None}
        (out / "data.json").write_text(json.dumps({**summary, "baselines": baselines}, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose a folder that can be written") from None
