"""The training loop."""

import math
import time
from dataclasses import replace
from pathlib import Path

from fira.checkpoint.shards import Checkpoint, newest_valid
from fira.checkpoint.step_folders import find
from fira.checkpoint.writer import CheckpointWriter
from fira.devices import choose_devices, choose_precision
from fira.models.family import Recipe
from fira.optim.lr_schedule import learning_rate
from fira.training import run_folder, state
from fira.training.config import TrainConfig
from fira.training.numerical_faults import NumericalFault
from fira.training.rollback import roll_back, settle
from fira.training.run_report import RunReport
from fira.training.save_interval import SaveInterval
from fira.training.setup import Run, set_up
from fira.training.signals import Signals
from fira.training.step_trace import TRACED_STEP, traced
from pipeline.mpi import World


def train(config: TrainConfig, world: World, quiet: bool = False) -> None:
    """Train as configured, from the start or from a checkpoint, and write a run folder (collective).

    quiet: print no progress.
    """
    recipe = config.recipe()
    out = run_folder.choose(config)
    devices = choose_devices(config.device, config.local_devices, world.local_rank)
    config = replace(config, precision=choose_precision(run_folder.precision(config, out), devices))
    run = set_up(config, recipe.batch_size, devices, world, quiet)
    writer = CheckpointWriter(out / "checkpoints", config.keep)
    first = _resume(config, out, run, writer) + 1
    report = RunReport(config, out, run, first, recipe, quiet) if world.rank == 0 else None
    initial_loss = _validate(run, recipe, first - 1)
    _run_steps(config, recipe, run, report, writer, first)
    writer.finish()
    if report:
        report.finish(initial_loss)


def _run_steps(
    config: TrainConfig, recipe: Recipe, run: Run, report: RunReport | None, writer: CheckpointWriter, first: int
) -> None:
    """Train from step `first` to the last one, or until a signal ends the run (collective). report: on rank 0."""
    signals, interval = Signals(), SaveInterval(config.save_every)
    run.trainer.history.find_spikes = config.on_spike == "rollback"
    step, end = first - 1, False
    while step < recipe.steps and not end:
        step += 1
        started = time.perf_counter()
        lr = learning_rate(step, recipe.steps, recipe.lr, recipe.min_lr, recipe.warmup)
        trace = config.trace if step == first + TRACED_STEP - 1 else None
        requests = signals.take_requests()
        elapsed = report is not None and interval.has_elapsed()  # rank 0 decides by its clock
        extra = [*requests, float(elapsed), writer.finished()]
        try:
            with traced(run.trainer.model.engine, trace):
                result = run.trainer.step(run.loader, recipe.batch_size, lr, config.seed, extra)
                seconds = time.perf_counter() - started
            save, end, elapsed = (number > 0 for number in result.extra[:3])
            end = end or step == recipe.steps
            val_loss = _validate(run, recipe, step) if end or step % config.eval_every == 0 else None
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
            report.step(step, result, lr, seconds, val_loss)
        writer.advance(finished=result.extra[-1])
        if save or end or elapsed or interval.is_step(step):
            state.save(writer, step, run.trainer, run.loader, run.tokenizer)
            interval.restart()


def _validate(run: Run, recipe: Recipe, step: int) -> float:
    """The validation loss after a step; NumericalFault if it is not finite."""
    loss = run.trainer.evaluate(run.validation, recipe.batch_size)
    if not math.isfinite(loss):
        raise NumericalFault(
            f"step {step}: the validation loss is {loss}; resume from the last checkpoint with a lower --lr"
        )
    return loss


def _resume(config: TrainConfig, out: Path, run: Run, writer: CheckpointWriter) -> int:
    """Restore the checkpoint given by --resume and return its step; without one return 0."""
    if config.resume is None:
        return 0
    saved = newest_valid(out / "checkpoints") if config.resume == "auto" else Checkpoint.open(find(config.resume))
    if saved is None:
        return 0
    writer.last = saved.folder
    return state.restore(saved, run.trainer, run.loader, run.tokenizer)
