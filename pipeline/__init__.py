"""Pipeline parallelism over MPI for arbitrary layers.

``init()`` creates an ordinary ``torch.distributed`` process group on the ranks of ``mpirun``, ``fail()`` ends all ranks
with one message, and ``abort_on_failure()`` is the context manager for the entry point of a program.
"""

from pipeline.mpi import World, abort_on_failure, fail, init

__all__ = ["World", "abort_on_failure", "fail", "init"]
