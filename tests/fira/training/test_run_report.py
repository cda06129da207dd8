"""Log, picture and other files of a finished run."""

from fira.metrics.csv_log import read_log


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
