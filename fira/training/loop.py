"""The training loop."""

import logging
import math
import time
from dataclasses import replace
from pathlib import Path

from fira.checkpoint.shards import Checkpoint, newest_valid, open_checkpoint
from fira.devices import choose_devices, choose_precision
from fira.errors import UserError
from fira.models.family import Recipe
from fira.optim.lr_schedule import learning_rate
from fira.training import run_folder, state
from fira.training.config import TrainConfig
from fira.training.finish_marker import mark_finished, remove_marker
from fira.training.run_lock import RunLock
from fira.training.run_report import RunReport
from fira.training.setup import Run, set_up
from fira.training.signals import Signals
from fira.training.step_trace import TRACED_STEP, traced
from fira.training.stragglers import Stragglers
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
            if lock:
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
    recipe = config.recipe()
    devices = choose_devices(config.device, config.local_devices, world.local_rank)
    config = replace(config, precision=choose_precision(config.precision, devices))
    with doing("start"):
        run = set_up(config, recipe.batch_size, devices, world, saved, quiet)
        config = replace(config, micro_batch_size=run.trainer.split.microbatch)  # a resumed run keeps it on any layout
        settings = state.run_settings(config, run.corpus)
        first = 1
        if saved:
            state.check_settings(saved, settings, config.override)
            first += state.restore(saved, run.trainer, run.loader, run.tokenizer)
    report = RunReport(config, lock, run, first, recipe, quiet) if lock else None
    if report:
        remove_marker(out)
    initial_loss = _validate(run, recipe, first - 1)
    stragglers = Stragglers(world, run.trainer.mesh.layout)
    signals.catch_termination()
    for step in range(first, recipe.steps + 1):
        started = time.perf_counter()
        lr = learning_rate(step, recipe.steps, recipe.lr, recipe.min_lr, recipe.warmup)
        trace = config.trace if step == first + TRACED_STEP - 1 else None
        with traced(run.trainer.model.engine, trace), doing(f"step {step}"):
            stragglers.start()
            extra = [*signals.take_requests(), world.checksum(), *stragglers.exchanged()]
            result = run.trainer.step(run.loader, recipe.batch_size, lr, config.seed, extra)
            stragglers.stop()
            seconds = time.perf_counter() - started
        *requests, difference = result.extra[:3]
        _check_collectives(step, difference)
        save, end = (number > 0 for number in requests)
        end = end or step == recipe.steps
        val_loss = _validate(run, recipe, step) if end or step % config.eval_every == 0 else None
        if report:
            stragglers.update(step - 1, result.extra[3:])
            report.step(step, result, lr, seconds, val_loss)
        if save or end or step % config.save_every == 0:
            with doing(f"saving step {step}"):
                state.save(out / "checkpoints", step, run.trainer, run.loader, run.tokenizer, config.keep, settings)
        if end:
            break
    if report:
        with doing("plots", long=True):  # the other ranks have ended
            report.finish(initial_loss)
        if step == recipe.steps:
            mark_finished(out, step)


def _check_collectives(step: int, difference: float) -> None:
    """Raise on all ranks unless the ranks' checksums have the sum 0. The report names a recent operation."""
    if difference != 0:
        raise RuntimeError(f"step {step}: the ranks have called different collective operations, its results are wrong")


def _validate(run: Run, recipe: Recipe, step: int) -> float:
    """The validation loss after a step; UserError if it is not finite."""
    with doing(f"validation of step {step}"):
        loss = run.trainer.evaluate(run.validation, recipe.batch_size)
    if not math.isfinite(loss):
        raise UserError(
            f"step {step}: the validation loss is {loss}; "
            "resume from the last checkpoint with a lower --lr and --override"
        )
    return loss


def _open_resumed(config: TrainConfig, out: Path) -> Checkpoint | None:
    """Open the checkpoint given by --resume (collective); None without one."""
    if config.resume is None:
        return None
    return newest_valid(out / "checkpoints") if config.resume == "auto" else open_checkpoint(config.resume)
