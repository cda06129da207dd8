"""Log-probabilities of requests, which are packed into sequences as documents of their own.

requests    c c c t t    c t        "c": context, "t": continuation
tokens      c c c t  c  –           the last token of a request is not an input
targets     – – t t  t  –           "–": padding, or −100
documents   0 0 0 0  1 −1
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor

from fira.data.mixture import CountedBatches
from fira.data.rows import Rows
from fira.errors import UserError
from fira.evaluation.request_encoding import EncodedRequest
from fira.evaluation.task_forms import Likelihood
from fira.nn.cross_entropy import IGNORE_INDEX
from fira.posttraining.packing import pack

# (sequences, number of the first, count) → their reports [count, T, 2] of the objective TokenScores, float64 on the CPU
Reports = Callable[[CountedBatches, int, int], Tensor]


class PackedRequests:
    """Sequences of `seq_len` tokens, which depend on the requests only. It has the interface of ValidationSequences."""

    def __init__(self, requests: Sequence[EncodedRequest], seq_len: int) -> None:
        self._requests, self._seq_len = requests, seq_len
        self._sequences = pack([len(request.tokens) - 1 for request in requests], seq_len)

    def __len__(self) -> int:
        return len(self._sequences)

    def spans(self, number: int) -> Iterator[tuple[int, slice]]:
        """Yield the index of each request of a sequence, and the positions of its inputs."""
        start = 0
        for index in self._sequences[number]:
            span = slice(start, start + len(self._requests[index].tokens) - 1)
            yield index, span
            start = span.stop

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1, all of which exist."""
        tokens = np.zeros((count, self._seq_len), np.int64)
        targets, documents = np.full_like(tokens, IGNORE_INDEX), np.full_like(tokens, -1)
        for row in range(count):
            for document, (index, span) in enumerate(self.spans(first + row)):
                ids, scored, _ = self._requests[index]
                tokens[row, span], documents[row, span] = ids[:-1], document
                targets[row, span.stop - scored : span.stop] = ids[-scored:]
        return Rows(tokens, targets, documents)


def likelihoods(requests: Sequence[EncodedRequest], seq_len: int, batch: int, reports: Reports) -> list[Likelihood]:
    """Return the answer to each request. batch: number of sequences in a call of `reports`.

    Raises UserError if a log-probability is not finite.
    """
    packed = PackedRequests(requests, seq_len)
    found: dict[int, Likelihood] = {}
    for first in range(0, len(packed), batch):
        count = min(batch, len(packed) - first)
        for number, report in enumerate(reports(packed, first, count), first):
            for index, span in packed.spans(number):
                logs, largest = report[span.stop - requests[index].scored : span.stop].unbind(1)
                if not logs.isfinite().all():
                    raise UserError("a log-probability of the model is not finite; evaluate an earlier checkpoint")
                found[index] = Likelihood(float(logs.sum()), bool(largest.all()))
    return [found[index] for index in range(len(requests))]
