"""A run that is tracked, stopped after step 3 and continued from a checkpoint of step 2, to be read back."""

from pathlib import Path
from typing import Any

from PIL import Image

from fira.metrics.csv_log import Row
from fira.metrics.samples_log import Sample
from fira.metrics.trackers import Trackers

SETTINGS = {"model": "fira-tiny", "lr": 0.006, "steps": 4}
LOSSES = {1: 4.0, 2: 3.0, 3: 2.5, 4: 2.0}
EXPERTS = {"expert_load/layer_1/expert_0": 0.75, "expert_load/layer_1/expert_1": 0.25, "layer_entropy/layer_1": 0.5}


def row(step: int, **changed: Any) -> Row:
    values: dict[str, Any] = {"train_loss": LOSSES.get(step, 1.0), "lr": 0.25, "tokens_per_s": 9e3, "grad_norm": 0.5}
    layers: dict[str, Any] = {"expert_load": [[0.75, 0.25]], "layer_entropy": [[0.5]]}
    return Row(iter=step, **(values | layers | changed))


def track(name: str, out: Path) -> list[str]:
    """Track the run with one tracker, and return the hints."""
    out.mkdir()
    first = Trackers(name, out, SETTINGS, 1)
    first.numbers(0, {"val_loss": 7.5})
    for step in (1, 2, 3):
        first.row(row(step, val_loss=3.5 if step == 2 else None))
    first.samples(2, [Sample("def ", "main"), Sample("a ", "b")])
    first.finish(3)
    Image.new("RGB", (4, 3), "red").save(out / "training_progress.png")
    continued = Trackers(name, out, SETTINGS | {"steps": 5}, 3)
    for step in (3, 4):
        continued.row(row(step))
    return continued.finish(4)
