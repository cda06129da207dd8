"""The training loop."""

import logging
import math
import time
from dataclasses import replace
from pathlib import Path

from fira.checkpoint.shards import Checkpoint, newest_valid, open_checkpoint
from fira.checkpoint.step_folders import continue_from
from fira.checkpoint.writer import CheckpointWriter
from fira.devices import choose_devices, choose_precision
from fira.evaluation.task_scores import TaskScores
from fira.optim.lr_schedule import learning_rate
from fira.parallel.forward_pass import Mean
from fira.training import run_folder, state
from fira.training.config import TrainConfig
from fira.training.finish_marker import mark_finished, remove_marker
from fira.training.numerical_faults import NumericalFault
from fira.training.reference import with_reference
from fira.training.rollback import roll_back, settle
from fira.training.run_lock import RunLock
from fira.training.run_report import RunReport, check_trackers
from fira.training.sampled import with_samples
from fira.training.save_interval import SaveInterval
from fira.training.setup import Run, set_up
from fira.training.signals import Signals
from fira.training.step_trace import TRACED_STEP, check_trace, traced
from fira.training.stragglers import Stragglers
from fira.training.taught import with_teacher
from pipeline.mpi import World
from pipeline.mpi.activity import doing

logger = logging.getLogger(__name__)


def train(config: TrainConfig, world: World, signals: Signals, quiet: bool = False) -> None:
    """Train as configured, from the start or from a checkpoint, and write a run folder (collective).

    quiet: print no progress.
    """
    with run_folder.claim(config) as (out, lock):
        saved = _open_resumed(config, out)
        if saved and saved.step >= config.recipe().steps:
            logger.info("nothing to do: %s has all steps; give a larger --steps to continue the run", saved.folder)
            if lock and out.resolve() in saved.folder.resolve().parents:
                mark_finished(out, saved.step)
            return
        _train(config, out, lock, saved, world, signals, quiet)


def _train(
    config: TrainConfig,
    out: Path,
    lock: RunLock | None,
    saved: Checkpoint | None,
    world: World,
    signals: Signals,
    quiet: bool,
) -> None:
    """Train in the folder `out`, from the checkpoint `saved` if there is one. lock: on rank 0."""
    check_trace(config.trace)  # before the data are prepared
    check_trackers(config.track)
    devices = choose_devices(config.device, config.local_devices, world.local_rank)
    config = replace(config, precision=choose_precision(config.precision, devices))
    writer, first = CheckpointWriter(out / "checkpoints", config.keep), 1
    with doing("start"):
        run = with_reference(set_up(config, devices, world, saved, quiet), out, saved, quiet)
        run = with_samples(run, world)
        run = with_teacher(run, out, saved.step * config.recipe().batch_size if saved else 0, quiet)
        if saved:
            state.check_settings(saved, run.settings, config.override)
            first += state.restore(saved, run.trainer, run.loader, run.tokenizer)
            writer.last = saved.folder
    if lock and saved and saved.folder.resolve().parent == (out / "checkpoints").resolve():
        continue_from(saved.folder)  # before the later steps are removed from the log
    report = RunReport(lock, run, first, quiet) if lock else None
    if report:
        remove_marker(out)
    initial = None if saved else _validate(run, 0)
    if report and initial:
        report.initial(initial)
    signals.catch_termination()
    last, final = _run_steps(world, run, report, writer, signals, first)
    writer.finish()
    if report:
        with doing("plots", long=True):  # the other ranks have ended
            report.finish(initial.loss if initial else None, final)
        if last == config.recipe().steps:
            mark_finished(out, last)


def _run_steps(
    world: World, run: Run, report: RunReport | None, writer: CheckpointWriter, signals: Signals, first: int
) -> tuple[int, Mean | None]:
    """Train from step `first` to the last one, or until a signal ends the run (collective).

    report: on rank 0. Return the last step and the validation after it.
    """
    config, recipe = run.config, run.config.recipe()
    interval, stragglers = SaveInterval(config.save_every), Stragglers(world, run.trainer.mesh.layout)
    # The loss of GRPO is a share of few answers, of which a solved task has an outlier at every wrong one.
    run.trainer.history.find_spikes = config.on_spike == "rollback" and config.objective != "grpo"
    step, end, validation = first - 1, False, None
    while step < recipe.steps and not end:
        step += 1
        started = time.perf_counter()
        of_recipe = recipe.steps, recipe.lr, recipe.min_lr, recipe.warmup, recipe.lr_schedule
        lr = learning_rate(step, *of_recipe, config.lr_decay, config.warmup_shape)
        trace = config.trace if step == first + TRACED_STEP - 1 else None
        requests = signals.take_requests()
        elapsed = report is not None and interval.has_elapsed()  # rank 0 decides by its clock
        extra = [*requests, float(elapsed), writer.finished(), world.checksum(), *stragglers.exchanged()]
        try:
            with traced(run.trainer.model.engine, step, trace), doing(f"step {step}"):
                stragglers.start()
                result = run.trainer.step(run.loader, recipe.batch_size, lr, config.seed, extra)
                stragglers.stop()
                seconds = time.perf_counter() - started
            finished, difference, *times = result.extra[3:]
            _check_collectives(step, difference)
            save, end, elapsed = (number > 0 for number in result.extra[:3])
            end = end or step == recipe.steps
            scheduled = step == recipe.steps or step % config.eval_every == 0
            validation = _validate(run, step) if end or scheduled else None
            scores = _evaluate(run, step) if run.evaluation.is_due(step, recipe.steps) else None
            samples = run.samples.generate() if run.samples and run.samples.is_due(step, recipe.steps) else None
        except NumericalFault as fault:
            settle(writer, step)
            if config.on_spike != "rollback":
                raise
            step = roll_back(fault, step, run, writer)
            signals.repeat(requests)
            end = False
            if report:
                report.rewind(step)
            continue
        if report:
            stragglers.update(step - 1, times)
            report.step(step, result, lr, seconds, validation if scheduled else None)
            if scores:
                report.evaluation(step, scores)
            if samples:
                report.samples(step, samples)
        writer.advance(finished=finished)
        if save or end or elapsed or interval.is_step(step):
            state.save(writer, step, run.trainer, run.loader, run.tokenizer, run.settings, run.adapters)
            interval.restart()
    return step, validation


def _check_collectives(step: int, difference: float) -> None:
    """Raise on all ranks unless the ranks' checksums have the sum 0. The report names a recent operation."""
    if difference != 0:
        raise RuntimeError(f"step {step}: the ranks have called different collective operations, its results are wrong")


def _validate(run: Run, step: int) -> Mean:
    """Loss and metrics on the validation data after a step; NumericalFault if the loss is not finite."""
    with doing(f"validation of step {step}"):
        mean = run.trainer.forward.mean(run.validation, run.config.recipe().batch_size)
    if not math.isfinite(mean.loss):
        raise NumericalFault(
            f"step {step}: the validation loss is {mean.loss}; "
            "resume from the last checkpoint with a lower --lr and --override"
        )
    return mean


def _evaluate(run: Run, step: int) -> list[TaskScores]:
    """Scores in the tasks after a step (collective)."""
    with doing(f"evaluation of step {step}"):
        return run.evaluation.scores()


def _open_resumed(config: TrainConfig, out: Path) -> Checkpoint | None:
    """Open the checkpoint given by --resume (collective); None without one."""
    if config.resume is None:
        return None
    if config.resume == "auto":
        return newest_valid(out / "checkpoints", state.check_documents)
    return open_checkpoint(config.resume, state.check_documents)
