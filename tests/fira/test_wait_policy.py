"""OpenMP's threads spin while a process is alone, and sleep while it waits for cores; the user's choice is kept."""

import os
import subprocess
import sys
import threading

import pytest

from fira import wait_policy
from tests.launch import ROOT, inherited

# Two threads that compute on one core. Prints the seconds that they wait for it in a second, and whether this counts.
CONTENDED = """
import hashlib, os, sys, threading, types
from fira import wait_policy
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def compute():
    while True:
        hashlib.sha256(bytes(2**20))  # without the GIL
for _ in range(int(sys.argv[1])):
    threading.Thread(target=compute, daemon=True).start()
wait_policy.MEASURED_S = 1.0
for count in (1, 2):
    sys.modules["torch"] = types.SimpleNamespace(get_num_threads=lambda: count)
    before = wait_policy.waited_s()
    print(wait_policy.is_contended(), wait_policy.waited_s() - before)
"""
# CPU seconds of 20 parallel operations with pauses, in which the other thread spins or sleeps; before, while and after
# there are more threads than cores.
SPINNING = """
import threading, time, torch
from fira.wait_policy import exceed_cores, openmp_libraries
torch.set_num_threads(2)
data = torch.ones(2**16)
def spent():
    started = time.process_time()
    for _ in range(20):
        data.add_(1)
        time.sleep(0.002)
    return time.process_time() - started
spent()
end = threading.Event()
libraries = openmp_libraries()
print(spent())
time.sleep, sleep = (lambda seconds: end.wait() if threading.current_thread() is holder else sleep(seconds)), time.sleep
holder = threading.Thread(target=exceed_cores, args=(libraries, 0))
holder.start()
sleep(0.1)
print(spent())
end.set()
holder.join()
print(spent())
print(float(data[0]))
"""


def output(program: str, *arguments: str) -> list[str]:
    """Return the words that a program prints."""
    unset = {name: value for name, value in inherited().items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=unset,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout.split()


def test_threads_that_share_a_core_wait_for_it() -> None:
    one_thread, waited, two_threads, also_waited = output(CONTENDED, "2")
    assert (one_thread, two_threads) == ("False", "True")  # numbers of threads of torch
    assert min(float(waited), float(also_waited)) > 0.5


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_threads_spin_unless_there_are_more_than_cores() -> None:
    before, exceeding, after, value = map(float, output(SPINNING))
    assert exceeding < 0.5 * min(before, after)
    assert value == 81  # after 80 operations, each of which is computed


@pytest.mark.parametrize("name", [None, *wait_policy.CHOICES, "OMP_NUM_THREADS"])
def test_policy_of_the_user_is_kept(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()
    monkeypatch.setattr(wait_policy, "_watch", started.set)
    for variable in (*wait_policy.CHOICES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    if name:
        monkeypatch.setenv(name, "1")
    wait_policy.share_cores()
    assert started.wait(0 if name else 10) is (name is None)


def test_other_threads_are_created_only_while_the_cores_are_contended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurements alternate until the last one, which ends the thread."""
    measured = iter([False, True, False, True])
    held: list[float] = []
    monkeypatch.setattr(wait_policy, "is_contended", lambda: next(measured))
    monkeypatch.setattr(wait_policy, "openmp_libraries", lambda: ["library"])
    monkeypatch.setattr(wait_policy, "exceed_cores", lambda libraries, seconds: held.append(seconds))
    with pytest.raises(StopIteration):
        wait_policy._watch()
    assert held == [wait_policy.SLEEPING_S] * 2
