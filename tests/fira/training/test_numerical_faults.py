"""The rule by which a loss is a spike, and the state that it depends on."""

import json

import numpy as np
import pytest

from fira.training.numerical_faults import SIGMAS, WINDOW, FaultHistory, NumericalFault


def history_of(losses: list[float]) -> FaultHistory:
    history = FaultHistory()
    for loss in losses:
        history.add(loss)
    history.find_spikes = True
    return history


def test_spike_exceeds_the_mean_by_six_standard_deviations_of_the_window() -> None:
    losses = list(np.random.default_rng(0).normal(4, 0.1, 3 * WINDOW))
    threshold = float(np.mean(losses[-WINDOW:]) + 6 * np.std(losses[-WINDOW:]))
    history = history_of(losses)
    with pytest.raises(NumericalFault, match=rf"^the loss 4\.\d+ is a spike, .* of the last {WINDOW} steps, "):
        history.add(threshold + 1e-9)
    assert history.losses == losses[-WINDOW:]  # the spike is not recorded
    history.add(threshold - 1e-9)
    assert history.losses == [*losses[1 - WINDOW :], threshold - 1e-9]
    history.add(-1e9)  # a low loss is not a spike
    assert SIGMAS == 6


def test_spikes_are_found_from_half_a_window_on_and_only_on_request() -> None:
    few = history_of([1.0] * (WINDOW // 2 - 1))
    few.add(100.0)
    enough = history_of([1.0] * (WINDOW // 2))
    with pytest.raises(NumericalFault):
        enough.add(100.0)
    enough.find_spikes = False
    enough.add(100.0)


def test_restored_history_decides_the_same() -> None:
    losses = list(np.random.default_rng(1).normal(4, 0.1, WINDOW))
    history, restored = history_of(losses), history_of([])
    history.rollbacks.append({"step": 9, "restored": 5, "first": 20, "end": 36})
    restored.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert restored.state_dict() == history.state_dict()
    restored.add(4.0)
    assert history.losses == losses  # the states share no list
    with pytest.raises(NumericalFault):
        restored.add(6.0)
