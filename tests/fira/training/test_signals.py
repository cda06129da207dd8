"""Signals during training: SIGUSR1 saves a checkpoint, SIGTERM saves one and ends the run."""

import signal

import pytest

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
