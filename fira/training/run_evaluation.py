"""Evaluation of a model in training on the tasks of --eval-tasks, by all ranks of the run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from fira.checkpoint.ranks import collective_errors, gather, share_groups, this_rank
from fira.data.mixture import CountedBatches
from fira.data.tokenizer import TOKENIZER, parse_tokenizer
from fira.data.tokenizer_config import TokenizerConfig, read_config
from fira.errors import UserError
from fira.evaluation.greedy_answers import EncodedPrompt, GreedyDecoder, prompt_groups
from fira.evaluation.request_encoding import RequestEncoder
from fira.evaluation.task_evaluation import EncodedTask, GenerationTask, encode_task
from fira.evaluation.task_files import read_tasks
from fira.evaluation.task_scores import TaskScores
from fira.nn.objective import TokenScores
from fira.parallel.whole_model import whole_model, whole_size
from fira.planner.measure import device_memory
from fira.training.config import TrainConfig
from fira.training.trainer import Trainer
from pipeline.mpi import World
from pipeline.mpi.activity import doing


@dataclass(frozen=True)
class RunModel:
    """The distributed model, see `EvaluatedModel`; its methods are collective.

    batch: number of sequences in a call of `reports`. decoder: None without a tokenizer.
    """

    trainer: Trainer
    batch: int
    decoder: GreedyDecoder | None = None

    @property
    def seq_len(self) -> int:
        return int(self.trainer.model.config.seq_len)

    def reports(self, data: CountedBatches, first: int, count: int) -> Tensor:
        return self.trainer.forward.reports(data.batch, first, count, TokenScores())

    def answers(self, prompts: Sequence[EncodedPrompt]) -> list[str]:
        """Decode with the whole model in each process; groups of prompts are distributed over the ranks."""
        assert self.decoder is not None
        decoder, model = self.decoder, whole_model(self.trainer.model, self.trainer.mesh)
        with doing("generation of answers", long=True):  # no messages until all ranks have finished
            return share_groups(
                [*prompt_groups(prompts)],
                lambda group: decoder.answers(model, [prompts[index] for index in group]),
            )


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
    config: TrainConfig, trainer: Trainer, tokenizer: dict[str, bytes], world: World
) -> RunEvaluation:
    """Read and encode the tasks of a run on rank 0, and send them to all ranks (collective).

    tokenizer: the content of its files by name. Raises UserError for a missing file, an invalid record, without a
    tokenizer, and if answers are generated but the whole model does not fit into the memory of each process.
    """
    tasks: list[EncodedTask] = []
    model = RunModel(trainer, config.recipe().batch_size)
    if not config.eval_tasks:
        return RunEvaluation(tasks, model, None)
    parsed, special = _tokenizer(tokenizer)
    with collective_errors():
        if this_rank() == 0:
            encoder = RequestEncoder(parsed, special, model.seq_len)
            paths = [path.strip() for path in config.eval_tasks.split(",")]
            tasks = [encode_task(task, encoder) for task in read_tasks(paths)]
    tasks = gather(tasks)[0]
    if any(isinstance(task, GenerationTask) for task in tasks):
        with collective_errors():
            check_whole_model(trainer, world, "--eval-tasks", "evaluate them with evaluate.py after training")
    return RunEvaluation(tasks, replace(model, decoder=GreedyDecoder(parsed, special)), config.eval_tasks_every)


def _tokenizer(files: dict[str, bytes]) -> tuple[Tokenizer, TokenizerConfig]:
    if TOKENIZER not in files:
        raise UserError("--eval-tasks: the data has no tokenizer; give a --tokenizer")
    tokenizer = parse_tokenizer(files[TOKENIZER], Path(TOKENIZER))
    return tokenizer, read_config(tokenizer, Path(), files.get)


def check_whole_model(trainer: Trainer, world: World, flag: str, remedy: str) -> None:
    """Raise UserError if the whole model does not fit into the memory of this process.

    flag: what generates answers. remedy: what to do.
    """
    size = whole_size(trainer.model)
    if size > (available := device_memory(trainer.model.device, world.local_size)):
        raise UserError(
            f"{flag}: generated answers need the whole model in each process, {size / 1e9:,.1f} GB, and "
            f"{available / 1e9:,.1f} GB are available; {remedy}"
        )
