"""Report of a run by one rank: console output, training log, and the plot at the end."""

import logging
from collections.abc import Sequence
from pathlib import Path

from fira.checkpoint.ranks import collective_errors, this_rank
from fira.data.tokenizer import TOKENIZER, parse_tokenizer
from fira.evaluation.evaluation_log import EVALUATIONS, EvaluationLog
from fira.evaluation.task_scores import RESULTS, TaskScores, table, write_scores
from fira.metrics import console
from fira.metrics.csv_log import LOG_NAME, Row, TrainingLog
from fira.metrics.events import EventLog
from fira.metrics.run_plots import plot_files
from fira.metrics.samples_log import SAMPLES, Sample, SamplesLog
from fira.metrics.trackers import Trackers, check_packages
from fira.parallel.forward_pass import Mean
from fira.posttraining.chat_corpus import ChatCorpus
from fira.training import run_folder
from fira.training.run_lock import RunLock
from fira.training.setup import Run
from fira.training.trainer import StepResult

logger = logging.getLogger(__name__)


def check_trackers(names: str | None) -> None:
    """Raise UserError on all ranks if the package of a tracker is not installed (collective). names: see --track."""
    with collective_errors():
        if this_rank() == 0:
            check_packages(names)


class RunReport:
    """Writes the run folder except for the checkpoints, and prints progress; created by one rank only.

    lock: of the run folder. first: number of the first step, 1 or the one after a checkpoint.
    quiet: print no progress.
    """

    def __init__(self, lock: RunLock, run: Run, first: int, quiet: bool) -> None:
        out, recipe = lock.folder, run.config.recipe()
        self.metrics = run.trainer.split.objective.metrics
        self.log = TrainingLog(
            out / LOG_NAME, first - 1, self.metrics
        )  # first, because it refuses a file that is not a log
        self.evaluations = EvaluationLog(out / EVALUATIONS)
        self.evaluations.keep(first - 1)
        self.sample_log = SamplesLog(out / SAMPLES)
        self.sample_log.keep(first - 1)
        run_folder.write_settings(out, run.config, run.corpus.summary)
        layout = run.trainer.mesh.layout
        self.events = EventLog(out)
        self.events.append("train", step=first - 1, ranks=layout.world, layout=str(layout))
        self.trackers = Trackers(run.config.track, out, run.config.given(), first)
        self.lock, self.quiet = lock, quiet
        self._show(run.description)
        if first > 1:
            logger.info("resumed after step %d in %s", first - 1, out)
        self.out, self.run, self.steps = out, run, recipe.steps
        self.tokens = recipe.batch_size * run.trainer.model.config.seq_len
        self.progress = None if quiet else console.ConsoleProgress(recipe.steps, first, self.tokens)
        self.last: Row | None = None

    def initial(self, validation: Mean) -> None:
        """Report the validation before the first step of a new run."""
        metrics = {f"val_{name}": value for name, value in validation.metrics.items()}
        self.log.write_initial(validation.loss, metrics)
        self.trackers.numbers(0, {"val_loss": validation.loss, **metrics})

    def step(self, step: int, result: StepResult, lr: float, seconds: float, validation: Mean | None) -> None:
        """Report a step that took `seconds`, its validation excluded."""
        speed = self.tokens / seconds
        held_out = {} if validation is None else validation.metrics
        self.last = Row(
            iter=step,
            train_loss=result.loss,
            val_loss=None if validation is None else validation.loss,
            lr=lr,
            mfu=speed * self.run.flops_per_token / self.run.peak,
            tokens_per_s=speed,
            grad_norm=result.grad_norm,
            aux_loss=result.aux_loss,
            expert_load=result.expert_load,
            bubble=result.bubble,
            dropped=result.dropped,
            expert_dropped=result.expert_dropped if result.dropped else (),
            layer_entropy=[[entropy] for entropy in result.router_entropy],
            metrics=result.metrics | {f"val_{name}": value for name, value in held_out.items()},
        )
        if not self.lock.is_held():
            self._restore_folder()
        self.log.write(self.last)
        self.trackers.row(self.last)
        if self.progress:
            self.progress.update(self.last)

    def evaluation(self, step: int, scores: Sequence[TaskScores]) -> None:
        """Report the scores in the tasks after a step."""
        self.evaluations.write(step, scores)
        write_scores(self.out / RESULTS, f"{self.out.resolve()}, step {step}", scores)
        self._show(table(scores))
        for result in scores:
            numbers = {f"{result.task}/{metric}": score.value for metric, score in result.scores.items()}
            self.trackers.numbers(step, numbers)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Report the text samples of a step."""
        self.sample_log.write(step, samples)
        self.trackers.samples(step, samples)

    def rewind(self, step: int) -> None:
        """Remove the steps after `step` from the log, because they will be repeated."""
        self.log.close()
        self.log = TrainingLog(self.out / LOG_NAME, step, self.metrics)
        self.evaluations.keep(step)
        self.sample_log.keep(step)
        self.events.append("rollback", step=step)
        self.trackers.rewind(step)

    def _restore_folder(self) -> None:
        """Write the folder again after it was removed: the weights in memory may be the only ones that are left."""
        self.lock.acquire()
        run_folder.write_settings(self.out, self.run.config, self.run.corpus.summary)
        logger.warning("%s was removed and is written again; SIGUSR1 saves a checkpoint now", self.out)

    def finish(self, initial_loss: float | None, final: Mean | None) -> None:
        """Draw the plot and print the result.

        initial_loss: the validation loss of a new run before its first step. final: the validation after the last step;
        if a signal ended the run, it is not in the log, so that the continued run has the log of an uninterrupted one.
        """
        self.log.close()
        assert self.last is not None  # a run without steps is not started
        assert final is not None  # the last step of a run is always validated
        entropy = final.metrics.get("cross_entropy")
        self._show(console.loss_change(initial_loss, final.loss, self.run.corpus.summary, entropy))
        self._show(f"picture: {plot_files([self.out])}")
        if self.last.iter < self.steps:
            logger.info(
                "stopped by a signal after step %d; the same command with --resume auto continues", self.last.iter
            )
        for hint in self.trackers.finish(self.last.iter):
            self._show(f"tracker: {hint}")
        chats = isinstance(self.run.corpus, ChatCorpus)
        has_tokenizer = bool(self.run.tokenizer)
        self._show(console.next_command(self.out, has_tokenizer, chats, suggested_prompt(self.run)))

    def _show(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)


def suggested_prompt(run: Run) -> str:
    """A text to continue with the trained model: the first words of the training data; empty if they are not text."""
    if run.config.data is None:
        return "def "  # the default data are source code
    if isinstance(run.corpus, ChatCorpus) or not run.tokenizer:
        return ""
    tokenizer = parse_tokenizer(run.tokenizer[TOKENIZER], Path(TOKENIZER))
    first = run.corpus.sources[0].train
    return console.beginning(tokenizer.decode(first.read(0, min(64, len(first))).tolist()))
