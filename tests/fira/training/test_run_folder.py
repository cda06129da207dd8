"""The choice of the run folder, its lock, and the settings that a resumed run takes from it."""

import json
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fira.commands import train as command
from fira.errors import UserError
from fira.training import loop, run_folder
from fira.training.config import INHERITED, SUPERVISED, TrainConfig
from pipeline.mpi import World, world


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with settings and a checkpoint, in a current folder of its own."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "fira-tiny"
    config = TrainConfig(
        data="a.txt", lr=0.5, micro_batch_size=2, precision="bf16", seed=7, pp=4, out="elsewhere", override=True
    )
    (folder / "checkpoints" / "step-000010").mkdir(parents=True)
    run_folder.write_settings(folder, config, {"unigram": 6.0, "trigram": None})
    (folder / "checkpoints" / "step-000010" / "manifest.json").touch()
    return folder


def test_two_new_runs_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with run_folder.claim(TrainConfig()) as (first, _), run_folder.claim(TrainConfig()) as (second, _):
        assert [str(first), str(second)] == ["runs/fira-tiny", "runs/fira-tiny-2"]


def test_name_that_another_job_takes_at_the_same_moment_is_not_used(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "_numbered", lambda _: [])  # both jobs list the folders before one creates its own
    (tmp_path / "runs" / "fira-tiny").mkdir(parents=True)
    with run_folder.claim(TrainConfig()) as (out, _):
        assert str(out) == "runs/fira-tiny-2"


def test_folder_of_runs_that_cannot_be_created_is_a_user_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to("not mounted")
    with pytest.raises(UserError, match="runs: File exists; choose a writable folder"):
        run_folder.claim(TrainConfig()).__enter__()


@pytest.mark.parametrize("resume", [None, "auto"])
def test_second_job_with_the_same_folder_is_refused(tmp_path: Path, resume: str | None) -> None:
    config = TrainConfig(out=str(tmp_path / "run"), resume=resume)
    with run_folder.claim(config) as (out, _):
        with pytest.raises(UserError, match="is in use by process"), run_folder.claim(config):
            pass
        (out / "training_log.csv").touch()
    if resume is None:
        with pytest.raises(UserError, match="already contains a run; add --resume auto"), run_folder.claim(config):
            pass


def test_folder_of_a_run_that_fails_at_the_start_is_removed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data"), run_folder.claim(TrainConfig(out=str(tmp_path / "run"))):
        raise UserError("no data")
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in ("file", "file/run"):
        with pytest.raises(UserError, match="choose a writable folder"):
            run_folder.claim(TrainConfig(out=str(tmp_path / out))).__enter__()


@pytest.mark.parametrize("resume", ["auto", ".", "checkpoints", "checkpoints/step-000010"])
def test_resumed_run_takes_its_settings_but_neither_layout_nor_folder(run: Path, resume: str) -> None:
    found = run_folder.resumed_settings(TrainConfig(resume="auto" if resume == "auto" else str(run / resume)))
    assert found.pop("out", None) == ("runs/fira-tiny" if resume == "auto" else None)
    expected = {"data": "a.txt", "lr": 0.5, "micro_batch_size": 2, "precision": "bf16", "seed": 7, "steps": 500}
    assert found | expected == found
    assert not found.keys() & {"pp", "override", "resume", "out"}


def test_run_of_an_earlier_version_keeps_its_optimizer_and_schedule(run: Path) -> None:
    lines = (run / "config.toml").read_text().splitlines(keepends=True)
    (run / "config.toml").write_text("".join(x for x in lines if not x.startswith(("optimizer", "lr_schedule"))))
    found = run_folder.resumed_settings(TrainConfig(resume="auto"))
    assert (found["optimizer"], found["lr_schedule"]) == ("adamw", "cosine")


def test_every_setting_is_kept_by_a_resumed_run_or_belongs_to_machine_layout_or_output() -> None:
    """A new setting must be added to INHERITED or here."""
    layout = {"pp", "dp", "ep", "schedule", "plan", "recompute", "local_devices", "shard"}
    machine, output = {"device", "compile", "timeout", *SUPERVISED}, {"out", "resume", "override", "trace"}
    assert {field.name for field in fields(TrainConfig)} - set(INHERITED) == layout | machine | output


def test_newest_run_is_resumed(run: Path) -> None:
    (run.parent / "fira-tiny-10").mkdir()
    (run.parent / "fira-tiny-9").mkdir()
    assert run_folder.resumed_settings(TrainConfig(resume="auto")) == {"out": "runs/fira-tiny-10"}
    assert run_folder.resumed_settings(TrainConfig(resume="auto", model="rish-tiny")) == {}


def test_copied_checkpoint_has_no_settings(run: Path) -> None:
    copied = (run / "checkpoints" / "step-000010").rename(run / "best")
    assert run_folder.resumed_settings(TrainConfig(resume=str(copied))) == {}


@pytest.mark.parametrize(("content", "message"), [("lr", "is not TOML"), ("x = 1", "unknown key x")])
def test_damaged_settings_are_named(run: Path, content: str, message: str) -> None:
    (run / "config.toml").write_text(content)
    with pytest.raises(UserError, match=rf"runs/fira-tiny/config\.toml:? {message}"):
        run_folder.resumed_settings(TrainConfig(resume="auto"))


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that returns the settings with which the command would train."""
    configs: list[TrainConfig] = []
    monkeypatch.setattr(world, "_world", World(0, 1, 0, 1))
    monkeypatch.setattr(loop, "train", lambda config, *_: configs.append(config))
    return lambda *flags: (command.main(flags), configs[-1])[1]


def test_flags_override_the_settings_of_the_run(run: Path, configured: Any) -> None:
    config = configured("--resume", "auto", "--steps", "400", "--seed", "3")
    assert (config.out, config.data, config.lr, config.pp) == ("runs/fira-tiny", "a.txt", 0.5, None)
    assert (config.steps, config.seed, config.micro_batch_size, config.resume) == (400, 3, 2, "auto")
    assert configured("--resume", str(run), "--out", "new").out == "new"


def test_new_run_does_not_take_the_settings_of_another(run: Path, configured: Any) -> None:
    assert configured() == TrainConfig()
    assert configured("--init", str(run)) == TrainConfig(init=str(run))


def test_files_are_complete_and_contain_no_permission_to_override(run: Path) -> None:
    stored = tomllib.loads((run / "config.toml").read_text())
    assert (stored["lr"], stored["steps"], "override" in stored) == (0.5, 500, False)
    stored_counts = json.loads((run / "data.json").read_text())
    assert stored_counts["baselines"] == {"unigram": 6.0}
    assert "unigram" not in stored_counts
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.toml", "data.json"]


def test_run_that_starts_from_a_model_names_no_preset() -> None:
    assert tomllib.loads(TrainConfig().to_toml())["model"] == "fira-tiny"
    assert "model" not in tomllib.loads(TrainConfig(init="llama").to_toml())
