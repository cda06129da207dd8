"""Settings of all tests: one thread per process, and Triton kernels in the interpreter.

With one thread, sums have a fixed order, so that results can be compared bitwise, and processes that share cores do not
spend time in spinning threads.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported, here and in the processes that tests start
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, which transformers may do
