"""The training loop."""

import math
import time
from pathlib import Path

from fira.checkpoint.shards import Checkpoint, find, newest_valid
from fira.errors import UserError
from fira.models.family import Recipe
from fira.optim.lr_schedule import learning_rate
from fira.training import run_folder, state
from fira.training.config import TrainConfig
from fira.training.run_report import RunReport
from fira.training.setup import Run, set_up
from fira.training.signals import Signals
from fira.training.step_trace import STEP, traced
from pipeline.mpi import World


def train(config: TrainConfig, world: World) -> None:
    """Train as configured, from the start or from a checkpoint, and leave a run folder (collective)."""
    recipe = config.recipe()
    out = run_folder.choose(config)
    run = set_up(config, recipe.batch_size, world)
    done = _resume(config, out, run)
    report = RunReport(config, out, run, done, recipe) if world.rank == 0 else None
    before = _validate(run, recipe, done)
    signals = Signals()
    for step in range(done + 1, recipe.steps + 1):
        started = time.perf_counter()
        lr = learning_rate(step, recipe.steps, recipe.lr, recipe.min_lr, recipe.warmup)
        with traced(run.trainer.model.engine, config.trace if step == done + STEP else None):
            result = run.trainer.step(run.loader, recipe.batch_size, lr, config.seed, signals.wanted())
            seconds = time.perf_counter() - started
        save, end = (count > 0 for count in result.signals)
        end = end or step == recipe.steps
        val_loss = _validate(run, recipe, step) if end or step % config.eval_every == 0 else None
        if report:
            report.step(step, result, lr, seconds, val_loss)
        if save or end or step % config.save_every == 0:
            state.save(out / "checkpoints", step, run.trainer, run.loader, run.tokenizer, config.keep)
        if end:
            break
    if report:
        report.finish(before)


def _validate(run: Run, recipe: Recipe, step: int) -> float:
    loss = run.trainer.evaluate(run.validation, recipe.batch_size)
    if not math.isfinite(loss):
        raise UserError(
            f"step {step}: the validation loss is {loss}; resume from the last checkpoint with a lower --lr"
        )
    return loss


def _resume(config: TrainConfig, out: Path, run: Run) -> int:
    """The step that the run continues from: 0, or that of the checkpoint asked for."""
    if config.resume is None:
        return 0
    saved = newest_valid(out / "checkpoints") if config.resume == "auto" else Checkpoint.open(find(config.resume))
    return state.restore(saved, run.trainer, run.loader, run.tokenizer) if saved else 0
