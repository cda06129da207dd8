"""Layers, tensors and ranks: pipeline parallelism over MPI.

``init()`` gives every rank of ``mpirun`` an ordinary ``torch.distributed`` world; ``fail()`` ends all of them at once.
"""

from pipeline.mpi import World, fail, init

__all__ = ["World", "fail", "init"]
