"""Run a model over sequences without gradients: for validation, and for numbers that are computed before training."""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fira.data.mixture import CountedBatches
from fira.nn.objective import Objective
from fira.parallel.batch_split import BatchSplit, Read
from fira.parallel.cast_weights import cast_weights
from fira.parallel.kernel_loading import KernelLoading
from fira.parallel.parallelize import DistributedModel
from pipeline.schedule import forward_only


class Mean(NamedTuple):
    """Means over the terms of an objective: of the loss, and of its metrics by name."""

    loss: float
    metrics: dict[str, float]


class ForwardPass:
    """The forward pass of a model in parallel; every method is collective.

    split: of the batches. kernels: loads the kernels of the model.
    """

    def __init__(self, model: DistributedModel, split: BatchSplit, kernels: KernelLoading) -> None:
        self._model, self._split, self._kernels = model, split, kernels

    def mean(self, data: CountedBatches, batch: int) -> Mean:
        """The objective's means over all sequences of `data`, computed in batches of `batch` sequences."""
        objective = self._split.objective
        reports, terms = [], 0
        for first in range(0, len(data), batch):
            own, counted = self._reports(data.batch, first, min(batch, len(data) - first), self._split)
            reports.append(own)
            terms += counted
        sums = torch.cat(reports).T.contiguous().cpu()
        dist.all_reduce(sums)
        loss, *metrics = (value / terms for value in sums.sum(1).tolist())
        return Mean(loss, dict(zip(objective.metrics, metrics, strict=True)))

    def reports(self, read: Read, first: int, count: int, objective: Objective) -> Tensor:
        """The reports of sequences first, …, first + count − 1 under another objective, on every rank.

        Return float64 [sequences, …] on the CPU, for an objective whose report has one row per sequence.
        """
        sums, _ = self._reports(read, first, count, replace(self._split, objective=objective))
        sums = sums.cpu()
        dist.all_reduce(sums)
        return sums.flatten(0, 1)[:count]

    def _reports(self, read: Read, first: int, count: int, split: BatchSplit) -> tuple[Tensor, int]:
        """This rank's reports [micro-batches, …] at their numbers in the global batch, and the number of terms."""
        batch = split.batch(read, first, count, dropout_seed=None)
        with cast_weights(self._model.modules(), self._model.cast_copies):
            self._kernels.load(batch.microbatches[0], training=False)
            schedule = forward_only(self._model.placement, len(batch.microbatches))
            values = self._model.engine.run(schedule, batch.microbatches)
        return by_number(values, split, count, batch.microbatches[0].inputs.shape[1], self._model.device), batch.terms


def by_number(values: list[Tensor], split: BatchSplit, sequences: int, length: int, device: torch.device) -> Tensor:
    """Reports of this rank's micro-batches [micro-batches, …] float64 at their numbers in the global batch.

    Only ranks with the last stage have reports; those of padding are left out.
    """
    shape = split.objective.report_shape(split.microbatch, length)
    result = torch.zeros(split.total(sequences), *shape, dtype=torch.float64, device=device)
    if values:
        numbers = split.numbers(sequences)
        result[numbers.start : numbers.stop : numbers.step] = torch.stack(values)[: len(numbers)]
    return result
