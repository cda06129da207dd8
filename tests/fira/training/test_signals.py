"""Signals during training: SIGUSR1 saves a checkpoint, SIGTERM saves one and ends the run."""

import signal

import pytest

from fira.training.signals import Signals
from tests.fira.training.small_runs import PP2_DP2_EP2, kill_all, losses, start, wait_for


@pytest.mark.parametrize(
    ("number", "ends"), [pytest.param(signal.SIGUSR1, False, marks=pytest.mark.slow), (signal.SIGTERM, True)]
)
def test_signals_save_a_checkpoint(settings, tmp_path, number, ends):
    run = tmp_path / "run"
    process = start(settings, *PP2_DP2_EP2, "--out", run, "--steps", 3000, "--save-every", 3000, "--eval-every", 3000)
    try:
        wait_for((run / "training_log.csv").exists, process)
        wait_for(lambda: len(losses(run)) > 2, process)
        process.send_signal(number)  # mpirun forwards it to the ranks
        wait_for(lambda: (run / "checkpoints" / "latest").exists() or process.poll() == 0, process)
        if ends:
            assert process.wait(60) == 0
            assert "stopped by a signal" in process.stdout.read()
        else:
            saved = len(losses(run))
            wait_for(lambda: len(losses(run)) > saved, process)
    finally:
        kill_all(process)
    assert (run / "checkpoints" / "latest").exists()


def test_requests_of_an_abandoned_step_are_repeated():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        signals = Signals()
        for raised, requests in ((signal.SIGUSR1, [1.0, 0.0]), (signal.SIGTERM, [1.0, 1.0])):
            signal.raise_signal(raised)
            assert signals.take_requests() == requests
            assert signals.take_requests() == [0.0, 0.0]
            signals.repeat(requests)
            signals.repeat([0.0, 0.0])
            assert signals.take_requests() == requests
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
