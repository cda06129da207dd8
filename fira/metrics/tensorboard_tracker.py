"""Adapter of TensorBoard: event files in the folder `tensorboard` of the run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from fira.metrics.samples_log import Sample


class TensorBoardTracker:
    """See `Tracker`. Steps from `first` on that earlier files contain are not shown."""

    def __init__(self, out: Path, name: str, settings: Mapping[str, Any], first: int) -> None:
        folder = out / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=first if first > 1 else 0, flush_secs=10)
        self.hint = f"tensorboard --logdir {quote(str(folder))}"
        rows = [f"| {key} | {value} |" for key, value in settings.items()]
        self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), first - 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        for number, (prompt, text) in enumerate(samples, start=1):
            indented = "".join(f"    {line}\n" for line in (prompt + text).splitlines())  # shown as it is
            self._writer.add_text(f"samples/prompt_{number}", indented, step)

    def picture(self, step: int, path: Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image(path.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
