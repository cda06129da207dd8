"""Numbers of rows, the choice of trackers, and trackers that are missing or fail."""

import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fira.errors import UserError
from fira.metrics import trackers
from fira.metrics.trackers import TRACKERS, Trackers, check_packages, numbers_of, parse_names
from tests.fira.metrics.tracked_run import EXPERTS, row
from tests.launch import ROOT


class Recorder:
    """A tracker that records its calls."""

    hint = "see the list"
    opened: ClassVar[list[tuple[str, int]]] = []
    received: ClassVar[list[int]] = []

    def __init__(self, out: Path, name: str, settings: Mapping[str, Any], first: int) -> None:
        self.opened.append((name, first))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.received.append(step)

    def samples(self, step: int, samples: Any) -> None: ...

    def picture(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class Unreachable(Recorder):
    """A tracker that loses its connection in step 2."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        if step >= 2:
            raise ConnectionError("no route\nto host")


class Closed(Recorder):
    """A tracker that cannot be opened."""

    def __init__(self, *arguments: Any) -> None:
        raise RuntimeError


@pytest.fixture(autouse=True)
def adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder.opened.clear()
    Recorder.received.clear()
    kinds = {"wandb": Recorder, "mlflow": Recorder, "trackio": Unreachable, "tensorboard": Closed}
    monkeypatch.setattr(trackers, "_adapter", kinds.__getitem__)


def test_numbers_of_a_row_are_its_columns_with_one_per_expert() -> None:
    found = numbers_of(row(2, val_loss=3.5, metrics={"reward_margin": 1.5}))
    columns = {"train_loss": 3.0, "val_loss": 3.5, "lr": 0.25, "tokens_per_s": 9000, "grad_norm": 0.5}
    assert found == columns | EXPERTS | {"load_imbalance": 1.5, "router_entropy": 0.5, "reward_margin": 1.5}


def test_many_experts_are_written_every_few_steps() -> None:
    load = [[1 / 100] * 100] * 10  # 1000 numbers: every fourth step, 250 per step
    rows = {step: numbers_of(row(step, expert_load=load)) for step in range(1, 13)}
    assert [step for step, found in rows.items() if "expert_load/layer_10/expert_99" in found] == [4, 8, 12]


def test_names_are_checked() -> None:
    assert parse_names(None) == []
    assert parse_names("mlflow, wandb") == ["mlflow", "wandb"]
    with pytest.raises(UserError, match="--track comet: no such tracker; choose from tensorboard, wandb, trackio"):
        parse_names("wandb,comet")


def test_missing_package_is_an_error_also_next_to_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "PathFinder" in str(finder)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r"--track wandb needs the package wandb; pip install -e '\.\[wandb\]'"):
        check_packages("wandb")


def test_nothing_of_a_tracker_is_imported_unless_requested() -> None:
    code = (
        "import sys, fira.training.run_report, fira.training.loop\n"
        "from fira.metrics.trackers import Trackers\n"
        "from pathlib import Path\n"
        "Trackers(None, Path('.'), {}, 1).row(None)\n"
        f"assert not {set(TRACKERS)} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)


def test_later_starts_and_rollback_have_the_name_of_the_first_start(tmp_path: Path) -> None:
    Trackers("wandb,mlflow", tmp_path, {}, 1).rewind(7)
    Trackers("wandb", tmp_path, {}, 5)
    Trackers("wandb", tmp_path, {}, 1)  # killed before the first checkpoint
    assert [first for _, first in Recorder.opened] == [1, 1, 8, 8, 5, 1]
    (name,) = {name for name, _ in Recorder.opened}
    assert name.startswith(f"{tmp_path.name}-")


def test_runs_in_folders_of_the_same_name_have_different_names(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        Trackers("wandb", tmp_path / parent / "run", {}, 1)
    (first, _), (second, _) = Recorder.opened
    assert first != second


def test_trackers_that_fail_are_reported_once_and_the_others_continue(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        used = Trackers("tensorboard,trackio,wandb", tmp_path, {}, 1)
        for step in (1, 2, 3):
            used.row(row(step))
    assert Recorder.received == [1, 2, 3]
    assert [record.message for record in caplog.records] == [
        "--track tensorboard: RuntimeError; training continues without it",
        "--track trackio: no route to host; training continues without it",
    ]
    assert used.finish(3) == ["see the list"]
