"""Boundary cases of the learning-rate schedule."""

import pytest

from fira.optim.lr_schedule import learning_rate


def test_warmup_is_linear_and_reaches_the_peak():
    rates = [learning_rate(step, 100, 2.0, 0.1, 10) for step in range(1, 11)]
    assert rates == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[-1] == 2.0


def test_decay_is_a_half_cosine_to_the_last_step():
    rates = [learning_rate(step, 100, 1.0, 0.1, 10) for step in range(1, 101)]
    assert learning_rate(55, 100, 1.0, 0.1, 10) == pytest.approx(0.55)  # half of the decay
    assert learning_rate(40, 100, 1.0, 0.1, 10) == pytest.approx(0.1 + 0.9 * 0.75)  # a third: cos(π/3) = 1/2
    assert rates[-1] == pytest.approx(0.1, rel=1e-15)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_steps_after_the_last_have_the_lowest_rate():
    assert learning_rate(101, 100, 1.0, 0.1, 10) == learning_rate(190, 100, 1.0, 0.1, 10) == pytest.approx(0.1)


def test_without_warmup_the_decay_starts_at_once():
    assert learning_rate(1, 2, 1.0, 0.0, 0) == pytest.approx(0.5)
    assert learning_rate(2, 2, 1.0, 0.0, 0) == 0


def test_warmup_as_long_as_the_run():
    assert learning_rate(10, 10, 1.0, 0.1, 10) == 1.0
    assert learning_rate(11, 10, 1.0, 0.1, 10) == pytest.approx(0.1)


@pytest.mark.parametrize("peak", [6e-4, 3e-4, 0.3])
def test_rate_at_the_end_of_the_warmup_is_exactly_the_peak(peak):
    assert learning_rate(10, 100, peak, 0.1 * peak, 10) == learning_rate(10, 100, peak, 0.1, 10) == peak
