"""Values of --save-every."""

import pytest

from fira.errors import UserError
from fira.training.save_interval import SaveInterval


@pytest.mark.parametrize(("text", "steps"), [("1", [1, 2, 3, 4, 5, 6]), ("3", [3, 6]), ("7", [])])
def test_number_is_an_interval_in_steps(text: str, steps: list[int]) -> None:
    interval = SaveInterval(text, clock=lambda: 1e9)
    assert [step for step in range(1, 7) if interval.is_step(step)] == steps
    assert not interval.has_elapsed()


@pytest.mark.parametrize(("text", "seconds"), [("600s", 600), ("10m", 600), ("2h", 7200), ("0.5s", 0.5), ("1.5m", 90)])
def test_number_with_a_unit_is_a_time(text: str, seconds: float) -> None:
    now = 50.0
    interval = SaveInterval(text, clock=lambda: now)
    assert not any(interval.is_step(step) for step in range(1, 10_000))
    for expected in (False, True):
        now = 50 + seconds * (1 if expected else 0.99)
        assert interval.has_elapsed() == expected
    interval.restart()
    assert not interval.has_elapsed()
    now = 50 + 2 * seconds
    assert interval.has_elapsed()


@pytest.mark.parametrize(
    "text", ["0", "-1", "", "s", "10x", "1.5", "1e3", "0s", "0.0m", "10 m", "nan", "infs", "10ms", "9" * 5000]
)
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(
        UserError, match=f"^--save-every {text}: give a number of steps above 0, or a time such as 600s"
    ):
        SaveInterval(text)
