"""Learning-rate schedules against closed forms, with their boundary cases."""

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


def test_linear_decay_is_a_straight_line():
    rates = [learning_rate(step, 100, 1.0, 0.1, 20, "linear") for step in range(20, 101)]
    assert rates == pytest.approx([1 - 0.9 * i / 80 for i in range(81)], rel=1e-14)
    assert learning_rate(5, 100, 1.0, 0.1, 20, "linear") == 0.25  # warm-up
    assert learning_rate(150, 100, 1.0, 0.1, 20, "linear") == pytest.approx(0.1)


def test_wsd_is_constant_and_decays_in_the_last_steps():
    rates = [learning_rate(step, 200, 2.0, 0.2, 20, "wsd", 0.25) for step in range(1, 202)]
    assert rates[:20] == pytest.approx([0.1 * step for step in range(1, 21)])
    assert set(rates[19:150]) == {2.0}
    assert rates[150:] == pytest.approx([*(2 - 1.8 * i / 50 for i in range(1, 51)), 0.2], rel=1e-14)


def test_wsd_does_not_decay_before_the_end_of_the_warmup():
    for decay in (0.9, 1.0):
        wsd = [learning_rate(step, 100, 1.0, 0.0, 30, "wsd", decay) for step in range(1, 101)]
        assert wsd == [learning_rate(step, 100, 1.0, 0.0, 30, "linear") for step in range(1, 101)]
    assert learning_rate(100, 100, 1.0, 0.0, 0, "wsd", 0.001) == 1.0  # a share of less than half a step
