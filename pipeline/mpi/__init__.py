"""A ``torch.distributed`` backend over mpi4py. See README.md in this folder.

MPI and torch are not imported before ``init()`` is called, so that importing ``pipeline`` stays cheap.
"""

from pipeline.mpi.failure import abort_on_failure, fail
from pipeline.mpi.world import World, init

__all__ = ["World", "abort_on_failure", "fail", "init"]
