"""Dynamic loss scaling."""

from fira.optim.loss_scale import LossScale


def test_scale_halves_on_overflow_and_doubles_after_1000_good_steps():
    scale = LossScale(enabled=True)
    assert scale.value == 2**15
    scale.update(overflow=True)
    assert scale.value == 2**14
    for _ in range(999):
        scale.update(overflow=False)
    assert scale.value == 2**14
    scale.update(overflow=False)
    assert scale.value == 2**15
    for _ in range(1000):
        scale.update(overflow=False)
    assert scale.value == 2**16


def test_overflow_restarts_the_count_of_good_steps():
    scale = LossScale(enabled=True)
    for _ in range(999):
        scale.update(overflow=False)
    scale.update(overflow=True)
    assert (scale.value, scale.good_steps) == (2**14, 0)
    scale.update(overflow=False)
    assert (scale.value, scale.good_steps) == (2**14, 1)


def test_disabled_scale_stays_at_one():
    scale = LossScale(enabled=False)
    for _ in range(1001):
        scale.update(overflow=False)
    scale.update(overflow=True)
    scale.load_state_dict({"value": 2.0**15, "good_steps": 7})
    assert (scale.value, scale.good_steps) == (1.0, 0)


def test_state_is_restored():
    scale = LossScale(enabled=True)
    scale.update(overflow=True)
    scale.update(overflow=False)
    restored = LossScale(enabled=True)
    restored.load_state_dict(scale.state_dict())
    assert (restored.value, restored.good_steps) == (2**14, 1)
    for value in (2.0, 0.5):  # overflows can reduce the scale below one
        restored.load_state_dict({"value": value, "good_steps": 1})
        assert restored.value == value
    restored.load_state_dict(scale.state_dict())
    restored.load_state_dict(LossScale(enabled=False).state_dict())  # of a run without loss scaling
    assert (restored.value, restored.good_steps) == (2**14, 1)
