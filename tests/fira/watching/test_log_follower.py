"""A log that is read while it grows has the values of `read_log`."""

from pathlib import Path

import numpy as np
import pytest

from fira.errors import UserError
from fira.metrics.csv_log import LOG_NAME, TrainingLog, read_log
from fira.watching.log_follower import MAX_COLUMNS, MAX_POINTS, LogFollower
from tests.fira.metrics.tracked_run import row


def test_rows_are_read_once_when_they_are_complete(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    follower = LogFollower(path)
    follower.update()
    assert follower.curves() == {}
    log = TrainingLog(path)
    log.write_initial(7.5, {})
    log.write(row(1))
    follower.update()
    with path.open("a") as file:
        file.write("2,3.25,,0.2")  # a part of a row
    follower.update()
    assert follower.curves()["train_loss"] == [[1], [4.0]]
    with path.open("a") as file:
        file.write("5,0.5,9000,0.5,,1.5,0.750 0.250,,,,,0.5\n")
    follower.update()
    curves = follower.curves()
    assert curves["train_loss"] == [[1, 2], [4.0, 3.25]]
    assert curves["val_loss"] == [[0], [7.5]]
    assert curves["mfu"] == [[2], [0.5]]
    assert "bubble" not in curves
    assert follower.expert_load() == {"steps": [1, 2], "layers": [[[1.5, 0.5], [1.5, 0.5]]]}


def test_log_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    follower = LogFollower(path)
    log = TrainingLog(path)
    for step in range(1, 31):
        log.write(row(step))
    follower.update()
    log.close()
    log = TrainingLog(path, resume_step=10)
    log.write(row(11, train_loss=9.0))
    follower.update()
    steps, losses = follower.curves()["train_loss"]
    assert steps == list(range(1, 12))
    assert losses[-1] == 9.0


def test_long_log_has_means_of_all_steps(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    log = TrainingLog(path)
    for step in range(1, 5001):
        log.write(row(step, train_loss=step / 100, val_loss=1.0 if step % 2 else None))
    follower = LogFollower(path)
    follower.update()
    steps, losses = follower.curves()["train_loss"]
    assert len(steps) == MAX_POINTS == len(follower.curves()["val_loss"][0])
    assert steps[-1] == 5000
    expected = [part.mean() for part in np.split(read_log(path)["train_loss"].to_numpy(), range(0, 5000, 25)[1:])]
    means = np.interp(range(13, 5000, 25), np.array(steps) - 3, losses)
    np.testing.assert_allclose(means, expected, atol=0.05)
    columns = follower.expert_load()
    assert MAX_COLUMNS / 2 < len(columns["steps"]) <= MAX_COLUMNS
    gaps = np.diff(columns["steps"])[:-1]
    assert gaps.max() == gaps.min()


@pytest.mark.parametrize("steps", [1, 10, 199, 200, 201, 399, 400, 1000, 10_001])
def test_columns_of_experts_end_at_the_last_step(tmp_path: Path, steps: int) -> None:
    """At each of two reads while the log grows; the load of the first expert contains the step."""
    path = tmp_path / LOG_NAME
    follower = LogFollower(path)
    header = "iter,train_loss,val_loss,lr,mfu,expert_load\n"
    rows = [f"{step},3,,1,,{step} 0" for step in range(1, steps + 1)]
    for end in sorted({-(-steps // 3), steps}):
        path.write_text(header + "\n".join(rows[:end]) + "\n")
        follower.update()
        columns = follower.expert_load()
        assert (columns["steps"][0], columns["steps"][-1]) == (1, end)
        assert len(columns["steps"]) == len(set(columns["steps"])) <= MAX_COLUMNS
        assert [loads[0] / 2 for loads in columns["layers"][0]] == columns["steps"]


def test_other_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    path.write_text("my,own,notes\n")
    with pytest.raises(UserError, match="is not a training log"):
        LogFollower(path).update()


def test_new_run_in_the_file_of_a_removed_one_is_read_from_its_beginning(tmp_path: Path) -> None:
    """File systems reuse inodes, and a longer log does not show that it is another one."""
    path = tmp_path / LOG_NAME
    follower = LogFollower(path)
    for steps, loss in ((20, 1.0), (40, 2.0)):
        path.write_text("")
        log = TrainingLog(path)
        for step in range(1, steps + 1):
            log.write(row(step, train_loss=loss))
        log.close()
        follower.update()
        assert follower.curves()["train_loss"] == [list(range(1, steps + 1)), [loss] * steps]


def test_damaged_rows_do_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    log = TrainingLog(path)
    log.write(row(1))
    log.close()
    good = path.read_text().splitlines()[-1]
    with path.open("a") as file:
        file.write(good.replace("1,", "inf,", 1) + "\n" + good.replace("1,", "2,", 1).replace("0.75", "a lot") + "\n")
    follower = LogFollower(path)
    follower.update()
    assert list(follower.steps) == [1, 2]
    assert follower.expert_load()["steps"] == [1]
