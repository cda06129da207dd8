"""TORCH_DISTRIBUTED_DEBUG=DETAIL: before each collective, the ranks check that they call the same one.

Without this check, an MPI library may reduce tensors of different sizes to a wrong result without an error or a hang.
"""

import json
from itertools import accumulate

import numpy as np
from mpi4py import MPI

from pipeline.mpi.hang_report import HangReport
from pipeline.mpi.trace import Entry
from pipeline.mpi.work import Steps


class Agreement:
    """Comparison of the collectives that the ranks of a communicator are about to start."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm.Dup()

    def before(self, steps: Steps, entry: Entry) -> Steps:
        """Run ``steps`` if the entries of all ranks match.

        Raises:
            ValueError: if they differ. The message names the calling line of each rank.
        """
        own, sizes = json.dumps(entry.as_json(waiting=False)).encode(), np.zeros(self._comm.Get_size(), np.int64)
        yield [self._comm.Iallgather(np.array([len(own)]), sizes)]
        gathered = bytearray(int(sizes.sum()))
        ends = list(accumulate(sizes.tolist()))
        yield [self._comm.Iallgatherv(own, [gathered, (sizes, np.array(ends) - sizes), MPI.BYTE])]
        texts = [gathered[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        calls = {rank: json.loads(text) for rank, text in zip(entry.group.ranks, texts, strict=True)}
        if mismatches := HangReport({rank: {"operations": [call]} for rank, call in calls.items()}, {}).mismatches:
            raise ValueError(mismatches[0])
        yield from steps
