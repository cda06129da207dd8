"""Signals during training: SIGUSR1 saves a checkpoint, SIGTERM saves one and ends the run."""

import signal
import subprocess
import sys
from types import FrameType
from typing import Any

import pandas as pd
import pytest

from fira.metrics.csv_log import read_log
from fira.training.signals import Signals
from tests.fira.training.small_runs import PP2_DP2_EP2, PP4, kill_all, losses, start, train, wait_for
from tests.launch import inherited

SIGNAL_AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name in ("torch", "mpi4py"):
            os.kill(os.getpid(), signal.SIGUSR1)
            print("running", flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
sys.argv = ["scripts/train.py"]
exec(open("scripts/train.py").read())
"""


@pytest.fixture
def signals() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    found = Signals()
    found.catch_termination()
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


def test_requests_are_taken_once(signals: Signals) -> None:
    assert signals.take_requests() == [0, 0]
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    assert signals.take_requests() == [1, 0]
    signal.raise_signal(signal.SIGTERM)
    assert signals.take_requests() == [1, 1]
    assert signals.take_requests() == [0, 0]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_no_signal_is_lost_between_two_instructions(signals: Signals, number: signal.Signals) -> None:
    """Raise the signal before each bytecode instruction of `take_requests`, once per call."""
    remaining, moment = -1, 0  # negative: no signal is raised

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal remaining
        frame.f_trace_opcodes = True
        if frame.f_code is Signals.take_requests.__code__ and event == "opcode":
            remaining -= 1
            if remaining == 0:
                signal.raise_signal(number)
        return trace

    sys.settrace(trace)
    signals.take_requests()  # Python 3.12.1 traces the instructions of code that has been traced before
    sys.settrace(None)
    while remaining <= 0:
        moment += 1
        remaining = moment
        sys.settrace(trace)
        during = signals.take_requests()
        sys.settrace(None)
        after = signals.take_requests()
        total = [a + b for a, b in zip(during, after, strict=True)]
        assert total == ([1, float(number == signal.SIGTERM)] if remaining <= 0 else [0, 0]), moment
    assert moment > 10


def test_signal_before_torch_and_mpi_are_imported_does_not_end_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNAL_AT_IMPORT], env=inherited(), capture_output=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, b"running"), done.stderr


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
            output = process.stdout.read()
            assert "stopped by a signal" in output
            assert "validation loss" in output
            assert read_log(run / "training_log.csv")["val_loss"].isna().all()
        else:
            saved = len(losses(run))
            wait_for(lambda: len(losses(run)) > saved, process)
    finally:
        kill_all(process)
    assert (run / "checkpoints" / "latest").exists()


@pytest.mark.slow
def test_log_of_a_run_that_is_ended_and_continued_is_that_of_an_uninterrupted_run(settings, uninterrupted, tmp_path):
    run = tmp_path / "run"
    process = start(settings, *PP4, "--out", run)
    try:
        wait_for((run / "training_log.csv").exists, process)
        wait_for(lambda: len(losses(run)) > 2, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "stopped by a signal" in process.stdout.read()
    finally:
        kill_all(process)
    train(settings, 4, *PP4, "--out", run, "--resume", "auto")
    continued, expected = (read_log(folder / "training_log.csv") for folder in (run, uninterrupted))
    times = ["mfu", "tokens_per_s", "bubble"]
    pd.testing.assert_frame_equal(continued.drop(columns=times), expected.drop(columns=times), check_exact=True)


def test_requests_of_an_abandoned_step_are_repeated():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        signals = Signals()
        signals.catch_termination()
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
