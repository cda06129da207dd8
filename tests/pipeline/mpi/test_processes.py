"""The processes of the ranks on one machine."""

import os
import subprocess
import sys

import pytest

from pipeline.mpi.processes import Processes


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open")
def test_a_rank_that_is_dead_already_does_not_prevent_the_others_from_being_watched() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    processes = Processes.__new__(Processes)  # without the communicator of the ranks
    processes._rank, processes._pids = 0, {0: os.getpid(), 1: dead.pid, 2: os.getppid()}
    handles = processes.handles()
    assert list(handles.values()) == [2]
    for handle in handles:
        os.close(handle)
