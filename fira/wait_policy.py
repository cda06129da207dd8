"""How threads of OpenMP wait for each other while other programs use the machine.

The threads of an operation meet at its end. In GNU OpenMP, which torch's wheels contain, those that arrive early spin
for milliseconds before they sleep. This saves the time of waking them. But if another program uses a core, a spinning
thread takes the time that the thread it waits for needs: next to one busy program, a process with two threads on two
cores reaches a quarter of its speed. Without spinning it reaches more than half of it, but it is slower when alone.

The library hardly spins (100 iterations) while a process has more OpenMP threads than cores, see its documentation of
GOMP_SPINCOUNT. The thread started here therefore measures how long the threads of the process wait for a core. If they
do, it creates idle OpenMP threads, which end after SLEEPING_S seconds, and measures again. The number of threads that
work on an operation does not change, and neither do results.
"""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

MEASURED_S = 0.2
SLEEPING_S = 4.0
CONTENTION = 0.2  # seconds that the threads of the process wait for a core, per second
THREADS = Path("/proc/self/task")
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_DYNAMIC", "OMP_THREAD_LIMIT")  # variables of the user


def share_cores() -> None:
    """Let the OpenMP threads of this process sleep while they wait, whenever other programs need the cores.

    A policy that the user has set is kept. There is no effect on systems other than Linux, with another OpenMP library,
    and in a process with one thread.
    """
    chosen = any(name in os.environ for name in CHOICES) or os.environ.get("OMP_NUM_THREADS") == "1"
    if THREADS.exists() and not chosen:
        threading.Thread(target=_watch, name="wait policy", daemon=True).start()


def _watch() -> None:
    while True:
        if is_contended() and (libraries := openmp_libraries()):
            sleeping = threading.Thread(target=exceed_cores, args=(libraries, SLEEPING_S), daemon=True)
            sleeping.start()
            sleeping.join()


def is_contended() -> bool:
    """Measure for MEASURED_S seconds whether the threads that share torch's operations wait for a core."""
    before = waited_s()
    time.sleep(MEASURED_S)
    waited = waited_s() - before
    count = getattr(sys.modules.get("torch"), "get_num_threads", None)  # None before torch is imported
    return waited > CONTENTION * MEASURED_S and count is not None and count() > 1


def waited_s() -> float:
    """Seconds that the current threads of this process have been ready to run without having a core."""
    nanoseconds = 0
    for thread in THREADS.iterdir():
        try:
            nanoseconds += int((thread / "schedstat").read_text().split()[1])
        except OSError:  # the thread has ended, or the kernel has no such statistics
            continue
    return nanoseconds / 1e9


def openmp_libraries() -> list[ctypes.CDLL]:
    """The loaded copies of GNU OpenMP: that of torch, and those of other packages."""
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return [ctypes.CDLL(path) for path in sorted({line.split()[-1] for line in mapped if "libgomp" in line})]


def exceed_cores(libraries: list[ctypes.CDLL], seconds: float) -> None:
    """Have more OpenMP threads than cores for some seconds. They belong to the calling thread, and end with it."""
    free = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing
    for library in libraries:
        library.GOMP_parallel(free, None, len(os.sched_getaffinity(0)) + 1, 0)
    time.sleep(seconds)
