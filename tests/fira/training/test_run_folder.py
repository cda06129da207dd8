"""Contents of a run folder, and refusal to write into an existing one."""

from fira.metrics.csv_log import read_log
from tests.fira.training.small_runs import train


def test_run_folder_contents(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {"config.toml", "data.json", "training_log.csv", "training_progress.png", "checkpoints"}
    header = (uninterrupted / "training_log.csv").read_text().splitlines()[0]
    assert header.startswith("iter,train_loss,val_loss,lr,mfu,")
    assert (uninterrupted / "training_progress.png").read_bytes().startswith(b"\x89PNG")
    log = read_log(uninterrupted / "training_log.csv")
    assert log["val_loss"].notna().tolist() == [step in (10, 20) for step in range(1, 21)]
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]
    assert log["mfu"].between(0, 1, inclusive="neither").all()


def test_existing_run_is_not_overwritten(settings, uninterrupted):
    before = (uninterrupted / "training_log.csv").read_bytes()
    result = train(settings, 1, "--out", uninterrupted, status=2)
    assert "already contains a run" in result.stderr
    assert (uninterrupted / "training_log.csv").read_bytes() == before
