"""For all tests: one thread per process.

Sums then have one order, so that what must be equal bit for bit is; and tests that share their cores with others do
not wait for threads that spin.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported, here and in the processes that tests start
