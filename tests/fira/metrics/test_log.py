"""The training log and the console lines, against csv, hand-written files and a clock that the test moves."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from fira.errors import UserError
from fira.metrics.console import ConsoleProgress
from fira.metrics.csv_log import COLUMNS, Row, TrainingLog, parse_layers, read_log


def row(step: int, **changed: object) -> Row:
    values: dict = {"train_loss": 3.0 + 1 / step, "lr": 6e-4, "tokens_per_s": 12345.678, "grad_norm": 0.5}
    return Row(iter=step, **(values | changed))


def write(path: Path, steps: range, resume_step: int = 0, **changed: object) -> None:
    log = TrainingLog(path, resume_step)
    for step in steps:
        log.write(row(step, **changed))
    log.close()


def test_columns_stand_in_the_promised_order(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", range(1, 2))
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == (
        "iter,train_loss,val_loss,lr,mfu,tokens_per_s,grad_norm,aux_loss,load_imbalance,expert_load,bubble,"
        "dropped,router_entropy,expert_dropped,layer_entropy"
    )


def test_a_row_is_in_the_file_at_once_and_reads_as_plain_csv(tmp_path: Path) -> None:
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


def test_experts_are_logged_one_by_one_and_as_means(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", range(1, 2), expert_dropped=[[0.0, 0.125], [0.5, 0.25]], layer_entropy=[[0.5], [1.0]])
    frame = read_log(tmp_path / "log.csv")
    assert parse_layers(frame["expert_dropped"][0]) == [[0, 0.125], [0.5, 0.25]]
    assert parse_layers(frame["layer_entropy"][0]) == [[0.5], [1]]
    assert frame["router_entropy"][0] == 0.75


def test_imbalance_is_one_when_even_and_absent_without_experts() -> None:
    assert row(1, expert_load=[[0.25] * 4] * 2).load_imbalance == 1
    assert row(1).load_imbalance is None


def test_read_log_gives_back_what_was_written(tmp_path: Path) -> None:
    loss = 3.1415927410125732  # a float32
    write(tmp_path / "log.csv", range(1, 4), train_loss=loss, expert_load=[[0.75, 0.25]])
    frame = read_log(tmp_path / "log.csv")
    assert list(frame.columns) == COLUMNS
    assert list(frame["iter"]) == [1, 2, 3]
    assert frame["train_loss"].astype("float32").eq(loss).all()
    assert frame["val_loss"].isna().all()
    assert parse_layers(frame["expert_load"][0]) == [[0.75, 0.25]]


def test_nan_and_infinity_survive(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", range(1, 2), train_loss=float("nan"), grad_norm=float("inf"))
    frame = read_log(tmp_path / "log.csv")
    assert frame["train_loss"].isna().all()
    assert frame["grad_norm"][0] == float("inf")


def test_resume_equals_a_run_without_interruption(tmp_path: Path) -> None:
    write(tmp_path / "whole.csv", range(1, 11))
    resumed = tmp_path / "resumed.csv"
    write(resumed, range(1, 9))
    with resumed.open("a") as file:
        file.write("9,3.1,,0.0")  # killed in the middle of a line
    assert list(read_log(resumed)["iter"]) == list(range(1, 9))
    write(resumed, range(6, 11), resume_step=5)
    assert resumed.read_text() == (tmp_path / "whole.csv").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.csv", "whole.csv"]


def test_a_new_run_starts_the_file_anew_and_a_resume_may_lack_it(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write(path, range(1, 5))
    write(path, range(1, 2))
    assert len(read_log(path)) == 1
    write(tmp_path / "other.csv", range(6, 8), resume_step=5)
    assert list(read_log(tmp_path / "other.csv")["iter"]) == [6, 7]


def test_a_log_with_the_first_five_columns_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("iter,train_loss,val_loss,lr,mfu\n1,3.5,,0.1,0.2\n")
    frame = read_log(path)
    assert list(frame.columns) == COLUMNS
    assert frame["mfu"][0] == 0.2
    assert frame["expert_load"].isna().all()


HEADER = ",".join(COLUMNS[:5])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"", "first line"),
        (b"a,b\n1,2\n", "first line"),
        (b"\xff\xfe\x00", "not text"),
        (f"{HEADER}\n1,2,3\n".encode(), "line 2 has 3 cells"),
        (f"{HEADER}\n1,two,,1,1\n".encode(), "two"),
    ],
)
def test_a_missing_or_foreign_file_is_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "log.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_log(path)
    message = str(raised.value)
    assert str(path) in message
    assert said in message
    assert "\n" not in message


def test_resume_leaves_a_foreign_file_untouched(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("my,own,notes\n")
    with pytest.raises(UserError, match="not a training log"):
        TrainingLog(path, resume_step=3)
    assert path.read_text() == "my,own,notes\n"


def test_logging_imports_neither_pandas_nor_matplotlib() -> None:
    code = (
        "import sys, fira.metrics.console, fira.metrics.run_plots; print({'pandas', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60).strip() == "set()"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def drive(total: int, first: int, seconds: dict[int, float], validate_every: int = 0) -> None:
    """Run steps of half a second each, or as `seconds` says, through a ConsoleProgress."""
    clock = Clock()
    progress = ConsoleProgress(total, first, tokens_per_step=1000, clock=clock)
    for step in range(first, total + 1):
        clock.now += seconds.get(step, 0.5)
        progress.update(row(step, val_loss=3.301 if validate_every and step % validate_every == 0 else None))


def steps_printed(text: str) -> list[int]:
    return [int(line.split("/")[0].removeprefix("step")) for line in text.splitlines()]


def test_a_line_every_two_seconds_plus_first_last_and_validations(capsys: pytest.CaptureFixture[str]) -> None:
    drive(total=23, first=1, seconds={}, validate_every=11)
    # step 1 at 0.5 s, then each 2 s; a validation's line (11, 22) starts the count again
    assert steps_printed(capsys.readouterr().out) == [1, 5, 9, 11, 15, 19, 22, 23]


def test_the_line_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    drive(total=600, first=599, seconds={599: 0.05, 600: 83}, validate_every=600)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "step 599/600 · loss 3.002 · lr 6.0e-04 · 20.0k tok/s · grad 0.50 · ETA 0:00"
    assert last == "step 600/600 · loss 3.002 · val 3.301 · lr 6.0e-04 · 24 tok/s · grad 0.50 · took 1:23"


def test_one_slow_step_bends_neither_speed_nor_eta(capsys: pytest.CaptureFixture[str]) -> None:
    drive(total=7300, first=101, seconds={101: 60.0})
    second = capsys.readouterr().out.splitlines()[1]
    assert "2.0k tok/s" in second
    assert second.endswith("ETA 59:58")  # 7195 steps of half a second


def test_eta_counts_the_validations_to_come(capsys: pytest.CaptureFixture[str]) -> None:
    """Every tenth step takes 5 s more: 0.98 s a step without the slowest of fifty, where the median says 0.5."""
    drive(total=1100, first=1, seconds=dict.fromkeys(range(10, 1101, 10), 5.5), validate_every=10)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step  100/")]
    mean = (45 * 0.5 + 4 * 5.5) / 49
    minutes, seconds = divmod(round(1000 * mean), 60)
    assert line.endswith(f"ETA {minutes}:{seconds:02d}")
