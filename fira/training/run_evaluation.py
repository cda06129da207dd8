"""Evaluation of a model in training on the tasks of --eval-tasks, by all ranks of the run."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fira.checkpoint.ranks import collective_errors, gather, this_rank
from fira.data.mixture import CountedBatches
from fira.data.tokenizer import TOKENIZER, parse_tokenizer
from fira.data.tokenizer_config import read_config
from fira.errors import UserError
from fira.evaluation.request_encoding import RequestEncoder
from fira.evaluation.task_evaluation import EncodedTask, encode_task
from fira.evaluation.task_files import read_tasks
from fira.evaluation.task_scores import TaskScores
from fira.nn.objective import TokenScores
from fira.parallel.forward_pass import ForwardPass
from fira.training.config import TrainConfig


@dataclass(frozen=True)
class RunModel:
    """The distributed model, see `EvaluatedModel`; its methods are collective."""

    forward: ForwardPass
    seq_len: int
    batch: int

    def reports(self, data: CountedBatches, first: int, count: int) -> Tensor:
        return self.forward.reports(data, first, count, TokenScores())


@dataclass(frozen=True)
class RunEvaluation:
    """The tasks of a run. every: number of steps between evaluations; None: after the last step only."""

    tasks: list[EncodedTask]
    model: RunModel
    every: int | None

    def is_due(self, step: int, last: int) -> bool:
        """Whether the tasks are evaluated after a step. last: the last step of the run."""
        return bool(self.tasks) and (step == last or (self.every is not None and step % self.every == 0))

    def scores(self) -> list[TaskScores]:
        """The scores in all tasks (collective), which do not depend on the layout."""
        return [task.scores(self.model) for task in self.tasks]


def prepare_evaluation(
    config: TrainConfig, forward: ForwardPass, seq_len: int, tokenizer: dict[str, bytes]
) -> RunEvaluation:
    """Read and encode the tasks of a run on rank 0, and send them to all ranks (collective).

    tokenizer: the content of its files by name. Raises UserError for a missing file, an invalid record, and without a
    tokenizer.
    """
    tasks: list[EncodedTask] = []
    with collective_errors():
        if config.eval_tasks and this_rank() == 0:
            tasks = _encoded(config.eval_tasks, seq_len, tokenizer)
    model = RunModel(forward, seq_len, config.recipe().batch_size)
    return RunEvaluation(gather(tasks)[0] if config.eval_tasks else [], model, config.eval_tasks_every)


def _encoded(paths: str, seq_len: int, tokenizer: dict[str, bytes]) -> list[EncodedTask]:
    if TOKENIZER not in tokenizer:
        raise UserError("--eval-tasks: the data has no tokenizer; give a --tokenizer")
    parsed = parse_tokenizer(tokenizer[TOKENIZER], Path(TOKENIZER))
    encoder = RequestEncoder(parsed, read_config(parsed, Path(), tokenizer.get), seq_len)
    return [encode_task(task, encoder) for task in read_tasks([path.strip() for path in paths.split(",")])]
