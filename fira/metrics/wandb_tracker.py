"""Adapter of Weights & Biases: files in the folder `wandb` of the run folder, sent if there is an account."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import wandb

from fira.metrics.samples_log import Sample
from fira.metrics.tracker_protocol import PROJECT


class WandbTracker:
    """See `Tracker`. Without an API key and without WANDB_MODE, nothing is sent.

    Steps are numbers of their own, so that repeated ones are accepted.
    """

    def __init__(self, out: Path, name: str, settings: Mapping[str, Any], first: int) -> None:
        is_offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=out.resolve().name,
            id=name,
            resume="allow",
            dir=str(out),
            config=dict(settings),
            allow_val_change=True,
            mode="offline" if is_offline else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        folder = Path(self._run.dir).parent
        self.hint = f"wandb sync {quote(str(folder))}" if self._run.offline else str(self._run.url)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._run.log({"step": step, "samples": wandb.Table(["prompt", "text"], [list(sample) for sample in samples])})

    def picture(self, step: int, path: Path) -> None:
        self._run.log({"step": step, path.stem: wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()
