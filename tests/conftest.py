"""Settings of all tests: one thread per process, two processes for all tests, and Triton kernels in the interpreter.

With one thread, sums have a fixed order, so that results can be compared bitwise, and processes that share cores do not
spend time in spinning threads.
"""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported, here and in the processes that tests start
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, which transformers may do


@pytest.hookimpl(optionalhook=True)  # also without pytest-xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of processes: two for all tests, and none for those of an argument, so that -s and --pdb work.

    Not one per core, because a test may start four ranks.
    """
    return 2 if config.args_source is config.ArgsSource.TESTPATHS else 0
