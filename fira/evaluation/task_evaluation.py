"""Evaluation of a model on tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from torch import Tensor

from fira.data.mixture import CountedBatches
from fira.evaluation.greedy_answers import EncodedPrompt
from fira.evaluation.likelihoods import likelihoods
from fira.evaluation.request_encoding import EncodedRequest, RequestEncoder
from fira.evaluation.task_files import Task
from fira.evaluation.task_forms import ExactAnswer, LikelihoodExample
from fira.evaluation.task_scores import GeneratedAnswer, TaskScores, summarise


class EvaluatedModel(Protocol):
    """A model with a context of `seq_len` tokens. batch: number of sequences in a call of `reports`."""

    @property
    def seq_len(self) -> int: ...

    @property
    def batch(self) -> int: ...

    def reports(self, data: CountedBatches, first: int, count: int) -> Tensor:
        """The reports [count, T, 2] of sequences under the objective TokenScores, float64 on the CPU."""

    def answers(self, prompts: Sequence[EncodedPrompt]) -> list[str]:
        """The greedy answers to prompts, see `greedy_answers`."""


@dataclass(frozen=True)
class LikelihoodTask:
    """A task with log-probabilities. requests: by example."""

    name: str
    examples: list[LikelihoodExample]
    requests: list[list[EncodedRequest]]

    def scores(self, model: EvaluatedModel) -> TaskScores:
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


@dataclass(frozen=True)
class GenerationTask:
    """A task with generated answers. prompts: one per example."""

    name: str
    examples: list[ExactAnswer]
    prompts: list[EncodedPrompt]

    def scores(self, model: EvaluatedModel) -> TaskScores:
        answers = model.answers(self.prompts)
        scores = [example.scores(answer) for example, answer in zip(self.examples, answers, strict=True)]
        truncated = sum(prompt.truncated for prompt in self.prompts)
        generated = tuple(
            GeneratedAnswer(example.prompt, example.answer, answer, bool(score["exact_match"]))
            for example, answer, score in zip(self.examples, answers, scores, strict=True)
        )
        return TaskScores(self.name, len(scores), summarise(scores), truncated, answers=generated)


EncodedTask = LikelihoodTask | GenerationTask


def encode_task(task: Task, encoder: RequestEncoder) -> EncodedTask:
    """Encode the requests of a task. Raises UserError, which names file and line, for one that cannot be evaluated."""
    generated = [(where, example) for where, example in task.examples if isinstance(example, ExactAnswer)]
    if generated:  # all examples of a task have the same form
        prompts = [encoder.prompt(example, where) for where, example in generated]
        return GenerationTask(task.name, [example for _, example in generated], prompts)
    rated = [(where, example) for where, example in task.examples if not isinstance(example, ExactAnswer)]
    requests = [[encoder.request(request, where) for request in example.requests()] for where, example in rated]
    return LikelihoodTask(task.name, [example for _, example in rated], requests)
