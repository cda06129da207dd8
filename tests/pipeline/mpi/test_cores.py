import os
import subprocess
import sys
import threading

import pytest

from pipeline.mpi.cores import own_cores, running_on
from tests.launch import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not bind threads")


def test_threads_that_are_started_inside_run_on_the_cores() -> None:
    before, seen = os.sched_getaffinity(0), []
    with running_on({min(before)}):
        thread = threading.Thread(target=lambda: seen.append(own_cores()))
        thread.start()
        thread.join()
    assert seen == [{min(before)}]
    assert own_cores() == before


def test_cores_that_do_not_exist_are_no_error() -> None:
    before = own_cores()
    with running_on({max(before) + 100_000}):
        assert own_cores() == before
    with running_on(set()):
        assert own_cores() == before


TOKENIZE = """
import os
from pipeline.mpi.cores import running_on
from fira.data.tokenizer import train_tokenizer
everything = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(everything)})  # as a launcher binds a rank
with running_on(everything):
    train_tokenizer(["some text " * 100] * 100, 300)
threads = [set(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")]
assert os.sched_getaffinity(0) == {min(everything)}
print(sum(thread == everything for thread in threads), len(everything))
"""


@pytest.mark.skipif(len(own_cores()) < 2, reason="a machine with one core")
def test_tokenizer_has_a_thread_on_each_core_of_a_bound_rank() -> None:
    command = [sys.executable, "-c", TOKENIZE]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAYON_NUM_THREADS",)}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, env=environment)
    assert finished.returncode == 0, finished.stderr
    threads, cores = map(int, finished.stdout.split())
    assert threads >= cores
