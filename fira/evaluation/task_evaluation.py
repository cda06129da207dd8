"""Evaluation of a model on tasks."""

from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from torch import Tensor

from fira.data.mixture import CountedBatches
from fira.evaluation.likelihoods import likelihoods
from fira.evaluation.request_encoding import EncodedRequest, RequestEncoder
from fira.evaluation.task_files import Task
from fira.evaluation.task_forms import Example
from fira.evaluation.task_scores import TaskScores, summarise


class EvaluatedModel(Protocol):
    """A model with a context of `seq_len` tokens. batch: number of sequences in a call of `reports`."""

    @property
    def seq_len(self) -> int: ...

    @property
    def batch(self) -> int: ...

    def reports(self, data: CountedBatches, first: int, count: int) -> Tensor:
        """The reports [count, T, 2] of sequences under the objective TokenScores, float64 on the CPU."""


@dataclass(frozen=True)
class EncodedTask:
    """A task whose requests have been encoded. requests: by example."""

    name: str
    examples: list[Example]
    requests: list[list[EncodedRequest]]

    def scores(self, model: EvaluatedModel) -> TaskScores:
        """Evaluate a model."""
        requests = [request for own in self.requests for request in own]
        answers = iter(likelihoods(requests, model.seq_len, model.batch, model.reports))
        scores = [
            example.scores([next(answers) for _ in own])
            for example, own in zip(self.examples, self.requests, strict=True)
        ]
        return TaskScores(
            task=self.name,
            examples=len(scores),
            scores=summarise(scores),
            truncated=sum(request.truncated for request in requests),
            chance=fmean(example.chance for example in self.examples),
        )


def encode_task(task: Task, encoder: RequestEncoder) -> EncodedTask:
    """Encode the requests of a task. Raises UserError, which names file and line, for one that cannot be evaluated."""
    requests = [[encoder.request(request, where) for request in example.requests()] for where, example in task.examples]
    return EncodedTask(task.name, [example for _, example in task.examples], requests)
