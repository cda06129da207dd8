"""The progress of a run, read from its folder."""

from pathlib import Path

from fira.supervisor.run_state import RunState, read_state


def test_a_run_that_has_not_started(tmp_path: Path):
    assert read_state(tmp_path / "none") == RunState(0, 0, 0, 0, 0)


def test_steps_and_versions(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-000120\n")
    log = tmp_path / "training_log.csv"
    log.write_text("iter,train_loss\n" + "".join(f"{step},{'9' * 1000}\n" for step in range(1, 131)) + "131,0.")
    state = read_state(tmp_path)
    assert (state.saved_step, state.logged_step) == (120, 130)  # the row of step 131 is incomplete
    assert state.saved > 0
    assert state.log > 0
    assert state.finished == 0
    (tmp_path / "finished.json").write_text("{}")
    assert read_state(tmp_path).finished > 0
    log.write_text("iter,train_loss\n")
    assert read_state(tmp_path).logged_step == 0
