"""Adapter of trackio: a database in its own folder, or where TRACKIO_SERVER_URL or TRACKIO_SPACE_ID point."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import trackio

from fira.metrics.samples_log import Sample
from fira.metrics.tracker_protocol import PROJECT


class TrackioTracker:
    """See `Tracker`."""

    def __init__(self, out: Path, name: str, settings: Mapping[str, Any], first: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # the hint has the same content
            self._run = trackio.init(PROJECT, name=name, resume="allow", config=dict(settings), embed=False)
        self.hint = f"trackio show --project {PROJECT}"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._run.log({"samples": trackio.Table(dataframe=pd.DataFrame(samples))}, step)

    def picture(self, step: int, path: Path) -> None:
        self._run.log({path.stem: trackio.Image(str(path))}, step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()
