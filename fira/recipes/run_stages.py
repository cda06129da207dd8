"""Run the stages of a recipe in order, on all ranks of the job.

    train                 in the process of every rank: the stages share the process groups' backend, which starts once
    all other commands    in a child process of rank 0, which has the whole machine, while the other ranks wait

Rank 0 decides what is done, writes the records, and ends the child with itself. Until the child has ended, the ranks
exchange its status every POLL_S seconds, so that no wait is long and no rank spins.
"""

import gc
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from tqdm import tqdm

from fira.checkpoint.ranks import gather, gather_results, this_rank
from fira.errors import UserError
from fira.recipes.eta import TimeLeft
from fira.recipes.recipe_file import Recipe, Stage
from fira.recipes.stage_inputs import check_inputs
from fira.recipes.stage_state import State, begin, complete, interrupt, partial_output, state_of
from fira.supervisor.job import end_with_parent
from fira.training.finish_marker import FINISHED
from fira.training.run_lock import RunLock
from pipeline.mpi import World
from pipeline.mpi.activity import doing
from pipeline.mpi.launchers import without_launcher

POLL_S = 0.5
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Commands:
    """How commands are run. train: called with its arguments by all ranks.

    program: the words before the name of another command. flags: appended to its arguments.
    """

    train: Callable[[Sequence[str]], None]
    program: Sequence[str]
    flags: Sequence[str]


def run_stages(recipe: Recipe, world: World, commands: Commands) -> bool:
    """Run the stages that are not done (collective). Return whether all are; otherwise a signal has ended a run.

    Raises UserError if a stage fails; the following ones are not started.
    """
    with _lock(recipe):
        _on_rank_0(lambda: check_inputs(recipe))
        left = TimeLeft(recipe)
        return all(_run_stage(recipe, stage, world, commands, left) for stage in recipe.stages)


def _run_stage(recipe: Recipe, stage: Stage, world: World, commands: Commands, left: TimeLeft) -> bool:
    """Run a stage unless it is done (collective). Return whether it is then done."""
    label = f"[{recipe.stages.index(stage) + 1}/{len(recipe.stages)}] {stage.name}"
    if _on_rank_0(lambda: state_of(recipe, stage)) is State.DONE:
        logger.info("%s: unchanged, skipped", label)
        left.skip(stage)
        return True
    logger.info("%s: fira %s%s", label, stage.command, left.describe(stage))
    started = time.monotonic()
    with doing(f"stage {stage.name}"):
        state = _on_rank_0(lambda: begin(recipe, stage, world.size))
        if not _run_command(recipe, stage, state, commands):
            _on_rank_0(lambda: interrupt(recipe, stage, started))
            logger.info("%s: stopped by a signal; the same command continues it", label)
            return False
        seconds = _on_rank_0(lambda: complete(recipe, stage, started)).seconds
    left.finish(stage, seconds)
    logger.info("%s: took %s", label, tqdm.format_interval(round(seconds)))
    return True


def _run_command(recipe: Recipe, stage: Stage, state: State, commands: Commands) -> bool:
    """Run the command of a stage (collective). Return False if a signal has ended a training run early."""
    if stage.command != "train":
        arguments = recipe.arguments(stage, partial_output(recipe, stage))
        words = [*commands.program, stage.command, *arguments, *commands.flags]
        run_child(words, f"stage {stage.name}: fira {stage.command}")
        return True
    resume = ["--resume=auto"] if state is State.STARTED else []
    with _kept_settings():
        commands.train([*recipe.arguments(stage), *resume])
    return _on_rank_0(lambda: (recipe.output(stage.name) / FINISHED).exists())


def _on_rank_0(function: Callable[[], T]) -> T:
    """Call a function on rank 0, and return its result on all ranks (collective). Errors are raised on all ranks."""
    with doing("files of the recipe", long=True):
        return cast(T, gather_results(lambda: function() if this_rank() == 0 else None)[0])


@contextmanager
def _lock(recipe: Recipe) -> Iterator[None]:
    """Lock the folder of the recipe on rank 0 (collective)."""
    lock: list[RunLock] = []
    _on_rank_0(lambda: lock.append(RunLock(recipe.out)))
    try:
        yield
    finally:
        for held in lock:
            held.release()


@contextmanager
def _kept_settings() -> Iterator[None]:
    """Restore threads and the handler of SIGTERM after the block, and free the memory of earlier stages before it."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    gc.collect()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, handler)


def run_child(command: Sequence[str], name: str) -> None:
    """Run a command in a child process of rank 0 until it has ended (collective).

    name: in the UserError that is raised if it fails.
    """
    child: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        sys.stdout.flush()
        parent = os.getpid()
        environment = without_launcher(os.environ)
        child.append(subprocess.Popen(command, env=environment, preexec_fn=lambda: _end_with(parent)))

    _on_rank_0(start)
    try:
        while (status := gather(child[0].poll() if child else None)[0]) is None:
            _pause(child)
    finally:
        for process in child:
            process.kill()  # no effect after its end
            process.wait()
    if status:
        cause = f"signal {-status}" if status < 0 else f"status {status}"
        raise UserError(f"{name} ended with {cause}; correct it, and the same command continues here")


def _pause(child: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for the child at most POLL_S seconds; on other ranks, for the next exchange."""
    for process in child:
        try:
            process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            return


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when the rank that started it ends, also by SIGKILL."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
