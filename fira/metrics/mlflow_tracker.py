"""Adapter of MLflow: the store that MLFLOW_TRACKING_URI names, by default a database in the current folder."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow

from fira.metrics.samples_log import Sample
from fira.metrics.tracker_protocol import PROJECT

BATCH = 1000  # largest number of values in a request


class MlflowTracker:
    """See `Tracker`."""

    def __init__(self, out: Path, name: str, settings: Mapping[str, Any], first: int) -> None:
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)).experiment_id
        found = mlflow.search_runs([experiment], f"attributes.run_name = '{name}'", output_format="list")
        run = mlflow.start_run(run_id=found[0].info.run_id) if found else mlflow.start_run(run_name=name)
        new = {key: value for key, value in settings.items() if key not in run.data.params}
        mlflow.log_params(new)  # the value of a parameter cannot be changed
        mlflow.log_dict(dict(settings), f"settings_from_step_{first}.json")
        self.hint = f"mlflow ui --backend-store-uri {mlflow.get_tracking_uri()}"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        items = [(re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII), value) for name, value in values.items()]
        for start in range(0, len(items), BATCH):
            mlflow.log_metrics(dict(items[start : start + BATCH]), step, synchronous=False)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        rows = {"step": [step] * len(samples), "prompt": [s.prompt for s in samples], "text": [s.text for s in samples]}
        mlflow.log_table(rows, "samples.json")

    def picture(self, step: int, path: Path) -> None:
        mlflow.log_artifact(str(path))

    def close(self) -> None:
        mlflow.flush_async_logging()
        mlflow.end_run()
