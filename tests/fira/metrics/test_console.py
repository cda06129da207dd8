"""The lines of the console, with a clock that the test controls."""

import subprocess
from pathlib import Path

import pytest

from fira.metrics.console import ConsoleProgress, beginning, next_command
from tests.fira.metrics.test_csv_log import row


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def drive(total: int, first: int, seconds: dict[int, float], validate_every: int = 0) -> None:
    """Update a ConsoleProgress with steps that take half a second, or the time in `seconds`."""
    clock = Clock()
    progress = ConsoleProgress(total, first, tokens_per_step=1000, clock=clock)
    for step in range(first, total + 1):
        clock.now += seconds.get(step, 0.5)
        progress.update(row(step, val_loss=3.301 if validate_every and step % validate_every == 0 else None))


def steps_printed(text: str) -> list[int]:
    return [int(line.split("/")[0].removeprefix("step")) for line in text.splitlines()]


def test_line_every_two_seconds_and_for_first_last_and_validation_steps(capsys: pytest.CaptureFixture[str]) -> None:
    drive(total=23, first=1, seconds={}, validate_every=11)
    # step 1 at 0.5 s, then every 2 s; the line of a validation (11, 22) restarts the interval
    assert steps_printed(capsys.readouterr().out) == [1, 5, 9, 11, 15, 19, 22, 23]


def test_content_of_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    drive(total=600, first=599, seconds={599: 0.05, 600: 83}, validate_every=600)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "step 599/600 · loss 3.002 · lr 6.0e-04 · 20.0k tok/s · grad 0.50 · ETA 00:00"
    assert last == "step 600/600 · loss 3.002 · val 3.301 · lr 6.0e-04 · 24.1 tok/s · grad 0.50 · took 01:23"


def test_single_slow_step_does_not_affect_speed_and_eta(capsys: pytest.CaptureFixture[str]) -> None:
    drive(total=7300, first=101, seconds={101: 60.0})
    second = capsys.readouterr().out.splitlines()[1]
    assert "2.00k tok/s" in second
    assert second.endswith("ETA 59:58")  # 7195 steps of half a second


def test_eta_includes_future_validations(capsys: pytest.CaptureFixture[str]) -> None:
    """Every tenth step takes 5 s more: the mean without the slowest of 50 steps is 0.91 s, the median 0.5 s."""
    drive(total=1100, first=1, seconds=dict.fromkeys(range(10, 1101, 10), 5.5), validate_every=10)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step  100/")]
    mean = (45 * 0.5 + 4 * 5.5) / 49
    minutes, seconds = divmod(round(1000 * mean), 60)
    assert line.endswith(f"ETA {minutes:02d}:{seconds:02d}")


def test_accuracy_of_preferences_is_in_the_line_of_a_validation(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ConsoleProgress(2, 1, tokens_per_step=1000, clock=Clock())
    metrics = {"reward_accuracy": 0.5, "val_reward_accuracy": 0.9125}
    progress.update(row(1, metrics={"reward_accuracy": 0.5}))
    progress.update(row(2, val_loss=3.301, metrics=metrics))
    first, last = capsys.readouterr().out.splitlines()
    assert "accuracy" not in first
    assert " · val 3.301 · accuracy 91.2% · lr " in last


def test_next_command_is_a_chat_after_training_on_chats() -> None:
    run = Path("runs/x")
    assert next_command(run, True, chats=True).endswith("chat.py --checkpoint runs/x")
    assert next_command(run, True, chats=False, prompt="def ").endswith(
        'generate.py --checkpoint runs/x --prompt "def "'
    )
    assert next_command(run, True, chats=False).endswith("generate.py --checkpoint runs/x")
    assert "--tokenizer" in next_command(run, False, chats=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("यह एक वाक्य है।", "यह एक वाक्य "),
        ("One\nline", "One line "),
        ("costs 5$ now", "costs "),
        ('"quoted"', ""),
        (" ", ""),
    ],
)
def test_beginning_of_a_text_can_be_quoted(text: str, words: str) -> None:
    assert beginning(text) == words
    assert (
        subprocess.run(["bash", "-c", f'printf %s "{beginning(text)}"'], capture_output=True).stdout.decode() == words
    )
