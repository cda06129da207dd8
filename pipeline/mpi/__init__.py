"""A ``torch.distributed`` backend over mpi4py. See README.md beside this file.

Nothing here loads MPI or torch before ``init()`` is called, so that pure modules of ``pipeline`` stay cheap to import.
"""

from pipeline.mpi.failure import fail
from pipeline.mpi.world import World, init

__all__ = ["World", "fail", "init"]
