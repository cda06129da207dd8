"""What training minimises: the sum of a loss over the terms of the global batch, divided by their number.

    head       x [B, T, d]  →  `output` [n, …]     with the weight of the projection to logits
    last rank  output       →  `sums`              the loss to differentiate, and the numbers to report

A term is a trained token, or what else an objective counts, such as a pair of answers. All sums over micro-batches and
ranks are divided by the terms of the global batch, so that the result does not depend on the layout.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fira.nn.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from fira.nn.linear_losses import linear_losses
from fira.nn.projection import Projection

Stored = Mapping[str, Tensor]  # what was computed before training, by name; dim 0 of each tensor is the sequence


class Objective(Protocol):
    """Shapes: B sequences of T tokens in a micro-batch, hidden vectors x [B, T, d], vocabulary V.

    metrics: names of the numbers that `sums` reports in addition to the loss. Each is a mean over the terms.
    """

    metrics: tuple[str, ...]

    def count(self, targets: np.ndarray, stored: Mapping[str, np.ndarray]) -> int:
        """The number of terms of a global batch with targets [sequences, T]."""

    def output(self, x: Tensor, projection: Projection, targets: Tensor, stored: Stored) -> Tensor:
        """What the head returns, [n, …], for the logits of a projection and the targets [B, T]; dim 0 is 1 or B."""

    def sums(self, output: Tensor, targets: Tensor, stored: Stored) -> tuple[Tensor, Tensor]:
        """Return the loss [], summed over the terms of the micro-batch, and the numbers to report, of `report_shape`.

        In training the report is [1 + metrics], the loss without a graph and the metrics.
        """

    def report_shape(self, sequences: int, length: int) -> tuple[int, ...]:
        """The shape of the report of a micro-batch of this many sequences of `length` tokens."""


class OfTrainedTokens:
    """Base class of objectives whose terms are the trained tokens."""

    metrics: tuple[str, ...] = ()

    def count(self, targets: np.ndarray, stored: Mapping[str, np.ndarray]) -> int:
        return int(np.count_nonzero(targets != IGNORE_INDEX))


class CrossEntropy(OfTrainedTokens):
    """Next-token cross-entropy in nats per trained token."""

    def output(self, x: Tensor, projection: Projection, targets: Tensor, stored: Stored) -> Tensor:
        """[1], the summed loss."""
        return linear_cross_entropy(x.flatten(0, 1), projection, targets.flatten())[None]

    def sums(self, output: Tensor, targets: Tensor, stored: Stored) -> tuple[Tensor, Tensor]:
        total = output.sum()
        return total, total.detach()[None]

    def report_shape(self, sequences: int, length: int) -> tuple[int, ...]:
        return (1,)


def log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [N, V], targets [N] → [N], the log-probability of each target in nats, 0 where it is ignored."""
    chosen = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return chosen * (targets != IGNORE_INDEX)


class TokenScores(OfTrainedTokens):
    """The log-probability of each target, and whether it has the largest logit. It is not trained.

    The report is [B, T, 2]; both numbers are 0 where the target is ignored.
    """

    def output(self, x: Tensor, projection: Projection, targets: Tensor, stored: Stored) -> Tensor:
        """[B, T, 2]."""
        flat = targets.flatten()

        def scores(logits: Tensor, rows: slice) -> Tensor:
            largest = logits.argmax(-1) == flat[rows]
            return torch.stack([log_probabilities(logits, flat[rows]), largest.to(logits.dtype)], 1)

        return linear_losses(x.flatten(0, 1), projection, scores).view(*targets.shape, 2)

    def sums(self, output: Tensor, targets: Tensor, stored: Stored) -> tuple[Tensor, Tensor]:
        return -output[..., 0].sum(), output.detach()

    def report_shape(self, sequences: int, length: int) -> tuple[int, ...]:
        return sequences, length, 2
