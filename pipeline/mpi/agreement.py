"""TORCH_DISTRIBUTED_DEBUG=DETAIL: before each collective the ranks see whether they call the same one.

An MPI may add up tensors of different sizes without a word, with a wrong result and no hang to report.
"""

import json
from itertools import accumulate

import numpy as np
from mpi4py import MPI

from pipeline.mpi.hang_report import HangReport
from pipeline.mpi.trace import Entry
from pipeline.mpi.work import Steps


class Agreement:
    """Compares what the ranks of a communicator are about to do."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm.Dup()

    def before(self, steps: Steps, entry: Entry) -> Steps:
        """The steps, if all ranks' entries match.

        Raises:
            ValueError: they differ; it says where each of them was called.
        """
        own, sizes = json.dumps(entry.as_json(waiting=False)).encode(), np.zeros(self._comm.Get_size(), np.int64)
        yield [self._comm.Iallgather(np.array([len(own)]), sizes)]
        everyone = bytearray(int(sizes.sum()))
        ends = list(accumulate(sizes.tolist()))
        yield [self._comm.Iallgatherv(own, [everyone, (sizes, np.array(ends) - sizes), MPI.BYTE])]
        texts = [everyone[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        calls = {rank: json.loads(text) for rank, text in zip(entry.group.ranks, texts, strict=True)}
        if differ := HangReport({rank: {"operations": [call]} for rank, call in calls.items()}, {}).mismatches:
            raise ValueError(differ[0])
        yield from steps
