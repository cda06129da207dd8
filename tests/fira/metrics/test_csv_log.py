"""The training log, read with the csv module and compared with hand-written files."""

import csv
import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fira.errors import UserError
from fira.metrics.csv_log import COLUMNS, LOG_NAME, Row, TrainingLog, parse_layers, read_log


def row(step: int, **changed: object) -> Row:
    values: dict = {"train_loss": 3.0 + 1 / step, "lr": 6e-4, "tokens_per_s": 12345.678, "grad_norm": 0.5}
    return Row(iter=step, **(values | changed))


def write(path: Path, steps: range, resume_step: int = 0, **changed: object) -> None:
    log = TrainingLog(path, resume_step)
    for step in steps:
        log.write(row(step, **changed))
    log.close()


def test_columns_have_the_documented_order(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", range(1, 2))
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == (
        "iter,train_loss,val_loss,lr,mfu,tokens_per_s,grad_norm,aux_loss,load_imbalance,expert_load,bubble,"
        "dropped,router_entropy,expert_dropped,layer_entropy"
    )


def test_row_is_written_immediately_as_plain_csv(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = TrainingLog(path)
    log.write(row(7, val_loss=2.5, mfu=0.31, expert_load=[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], bubble=0.2))
    with path.open(newline="") as file:
        [cells] = csv.DictReader(file)  # before the log is closed
    log.close()
    assert cells["iter"] == "7"
    assert cells["val_loss"] == "2.5"
    assert cells["aux_loss"] == ""
    assert cells["expert_load"] == "0.500 0.250 0.250;0.200 0.200 0.600"
    assert float(cells["load_imbalance"]) == pytest.approx(0.6 * 3)


def test_values_per_expert_and_per_layer_are_logged(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", range(1, 2), expert_dropped=[[0.0, 0.125], [0.5, 0.25]], layer_entropy=[[0.5], [1.0]])
    frame = read_log(tmp_path / "log.csv")
    assert parse_layers(frame["expert_dropped"][0]) == [[0, 0.125], [0.5, 0.25]]
    assert parse_layers(frame["layer_entropy"][0]) == [[0.5], [1]]
    assert frame["router_entropy"][0] == 0.75


def test_imbalance_is_one_for_balanced_load_and_empty_without_experts() -> None:
    assert row(1, expert_load=[[0.25] * 4] * 2).load_imbalance == 1
    assert row(1).load_imbalance is None


def test_read_log_returns_the_written_values(tmp_path: Path) -> None:
    loss = 3.1415927410125732  # a float32
    write(tmp_path / "log.csv", range(1, 4), train_loss=loss, expert_load=[[0.75, 0.25]])
    frame = read_log(tmp_path / "log.csv")
    assert list(frame.columns) == COLUMNS
    assert list(frame["iter"]) == [1, 2, 3]
    assert frame["train_loss"].astype("float32").eq(loss).all()
    assert frame["val_loss"].isna().all()
    assert parse_layers(frame["expert_load"][0]) == [[0.75, 0.25]]


def test_nan_and_infinity_are_restored(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", range(1, 2), train_loss=float("nan"), grad_norm=float("inf"))
    frame = read_log(tmp_path / "log.csv")
    assert frame["train_loss"].isna().all()
    assert frame["grad_norm"][0] == float("inf")


def test_resumed_log_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    write(tmp_path / "uninterrupted.csv", range(1, 11))
    resumed = tmp_path / "resumed.csv"
    write(resumed, range(1, 9))
    with resumed.open("a") as file:
        file.write("9,3.1,,0.0")  # an incomplete line
    assert list(read_log(resumed)["iter"]) == list(range(1, 9))
    write(resumed, range(6, 11), resume_step=5)
    assert resumed.read_text() == (tmp_path / "uninterrupted.csv").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.csv", "uninterrupted.csv"]


def test_new_run_replaces_the_file_and_resume_creates_a_missing_one(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write(path, range(1, 5))
    write(path, range(1, 2))
    assert len(read_log(path)) == 1
    write(tmp_path / "other.csv", range(6, 8), resume_step=5)
    assert list(read_log(tmp_path / "other.csv")["iter"]) == [6, 7]


def test_log_with_the_first_five_columns_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("iter,train_loss,val_loss,lr,mfu\n1,3.5,,0.1,0.2\n")
    frame = read_log(path)
    assert list(frame.columns) == COLUMNS
    assert frame["mfu"][0] == 0.2
    assert frame["expert_load"].isna().all()


HEADER = ",".join(COLUMNS[:5])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "first line"),
        (b"a,b\n1,2\n", "first line"),
        (b"\xff\xfe\x00", "not text"),
        (f"{HEADER}\n1,2,3\n".encode(), "line 2 has 3 cells"),
        (f"{HEADER}\n1,two,,1,1\n".encode(), "two"),
    ],
)
def test_missing_or_invalid_file_raises_one_line_error(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "log.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_log(path)
    message = str(raised.value)
    assert str(path) in message
    assert reason in message
    assert "\n" not in message


def test_resume_does_not_change_an_invalid_file(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("my,own,notes\n")
    with pytest.raises(UserError, match="not a training log"):
        TrainingLog(path, resume_step=3)
    assert path.read_text() == "my,own,notes\n"


@pytest.mark.parametrize("step", [1, 4, 5])
def test_resume_keeps_the_rows_up_to_its_step(tmp_path: Path, step: int) -> None:
    path = tmp_path / "log.csv"
    write(path, range(1, 6))
    TrainingLog(path, resume_step=step).close()
    assert list(read_log(path)["iter"]) == list(range(1, step + 1))


def test_full_disk_raises_user_error_and_the_log_can_be_resumed(tmp_path: Path) -> None:
    """A limit on the size of files acts like a full disk."""
    path = tmp_path / "log.csv"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(UserError, match=r"log\.csv: File too large; check the folder and its disk, then continue"):
            write(path, range(1, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    written = len(read_log(path))
    assert 0 < written < 99
    write(path, range(written + 1, 11), resume_step=written)
    assert list(read_log(path)["iter"]) == list(range(1, 11))


@pytest.mark.parametrize("removal", ["file", "folder", "replaced"])
def test_log_that_is_removed_during_a_run_is_written_again(
    tmp_path: Path, removal: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "log.csv"
    path.parent.mkdir()
    log = TrainingLog(path)
    log.write(row(1))
    log.write(row(2))
    path.unlink()
    if removal == "folder":
        path.parent.rmdir()
    elif removal == "replaced":
        path.write_text("another file\n")
    log.write(row(3))
    log.write(row(4))
    log.close()
    assert list(read_log(path)["iter"]) == [1, 2, 3, 4]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} was removed or replaced by another program and is written again"
    ]


def test_log_that_cannot_be_written_again_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "run" / "log.csv"
    path.parent.mkdir()
    log = TrainingLog(path)
    path.unlink()
    path.parent.rmdir()
    path.parent.touch()  # a file in the place of the folder
    with pytest.raises(UserError, match=r"log\.csv: File exists; check the folder and its disk"):
        log.write(row(1))


def test_logging_imports_neither_pandas_nor_matplotlib() -> None:
    code = (
        "import sys, fira.metrics.console, fira.metrics.run_plots; print({'pandas', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60).strip() == "set()"


def test_validation_before_the_first_step_is_row_0(tmp_path):
    log = TrainingLog(tmp_path / LOG_NAME, metrics=["reward_margin"])
    log.write_initial(7.25, {"val_reward_margin": 0.5})
    log.write(Row(iter=1, train_loss=7.0, lr=0.1, tokens_per_s=1.0, grad_norm=1.0))
    log.close()
    assert (tmp_path / LOG_NAME).read_text().splitlines()[1].startswith("0,,7.25,,")
    assert read_log(tmp_path / LOG_NAME)["iter"].tolist() == [1]
    first = read_log(tmp_path / LOG_NAME, first=0).iloc[0]
    assert (first["iter"], first["val_loss"], first["val_reward_margin"]) == (0, 7.25, 0.5)
    assert math.isnan(first["train_loss"])
    TrainingLog(tmp_path / LOG_NAME, resume_step=1, metrics=["reward_margin"]).close()
    assert read_log(tmp_path / LOG_NAME, first=0)["iter"].tolist() == [0, 1]  # a resumed run keeps it
