"""Log, picture and other files of a finished run; a run folder that is removed, or has another log."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from fira.errors import UserError
from fira.metrics.csv_log import read_log
from fira.parallel.batch_split import BatchSplit
from fira.training.config import TrainConfig
from fira.training.run_lock import RunLock
from fira.training.run_report import RunReport, suggested_prompt
from tests.fira.small_model import TEXT, make_tokenizer
from tests.fira.training.small_runs import kill_all, losses, start, wait_for


def test_run_folder_contents(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    files = {".lock", "config.toml", "data.json", "training_log.csv", "training_progress.png", "finished.json"}
    assert names == files | {"checkpoints", "events.jsonl"}
    header = (uninterrupted / "training_log.csv").read_text().splitlines()[0]
    assert header.startswith("iter,train_loss,val_loss,lr,mfu,")
    assert (uninterrupted / "training_progress.png").read_bytes().startswith(b"\x89PNG")
    log = read_log(uninterrupted / "training_log.csv")
    assert log["val_loss"].notna().tolist() == [step in (10, 20) for step in range(1, 21)]
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]
    assert log["mfu"].between(0, 1, inclusive="neither").all()


def test_file_that_is_not_a_log_is_refused_before_the_settings_are_written(tmp_path):
    for name in ("training_log.csv", "config.toml"):
        (tmp_path / name).write_text("my,own,notes\n")
    trainer = SimpleNamespace(split=BatchSplit(1, 1, 0, 8))
    run = SimpleNamespace(corpus=SimpleNamespace(summary={}), config=TrainConfig(), trainer=trainer)
    with pytest.raises(UserError, match=r"training_log\.csv is not a training log"):
        RunReport(RunLock(tmp_path), run, first=5, quiet=True)
    assert (tmp_path / "config.toml").read_text() == "my,own,notes\n"


@pytest.mark.slow
def test_folder_that_is_removed_during_a_run_is_written_again(settings, uninterrupted, tmp_path):
    run = tmp_path / "run"
    process = start(settings, "--out", run, "--steps", 40, "--save-every", 1000)
    try:
        wait_for((run / "training_log.csv").exists, process)
        wait_for(lambda: len(losses(run)) > 2, process)
        shutil.rmtree(run)
        assert process.wait(100) == 0
    finally:
        kill_all(process)
    assert len(losses(run)) == 40  # of which the first lines were written before the removal
    # events.jsonl has had the start of the run, which was removed.
    assert {path.name for path in run.iterdir()} == {path.name for path in uninterrupted.iterdir()} - {"events.jsonl"}
    assert (run / "checkpoints" / "step-000040").is_dir()


class Tokens(list[int]):
    """The tokens of a source."""

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.array(self[start:stop])


def test_suggested_prompt_is_the_beginning_of_the_training_data():
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(TEXT).ids
    corpus = SimpleNamespace(sources=[SimpleNamespace(train=Tokens([tokenizer.token_to_id("</s>"), *ids]))])
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    run = SimpleNamespace(config=TrainConfig(data="wald.txt"), corpus=corpus, tokenizer=files)
    assert suggested_prompt(run) == "Die Bäume stehen "
    run.tokenizer = {}  # shards without a tokenizer
    assert suggested_prompt(run) == ""
    run.config = TrainConfig()
    assert suggested_prompt(run) == "def "
