"""scripts/train.py with a fault in one rank: `mpirun -np 2 python tests/chaos/faulty_train.py killed start FOLDER …`.

The fault is injected by replacing functions of the product in this process, before it starts:

    start       before the model is built
    preparation before the data are prepared
    training    before the backward of the second micro-batch (or the only one) of the second step
    validation  in the validation after the second step
    saving      before the tensors of the second step are copied for its checkpoint
    exit        after the last line of the script

The time of the fault is written to `FOLDER/fault`.
"""

import ctypes
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fira import cli
from fira.checkpoint import writer
from fira.commands.train import main
from fira.training import loop, run_data
from fira.training.trainer import Trainer
from pipeline.stage import Stage

FAULT, PLACE, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
RANK = 0 if PLACE == "preparation" else 1  # the rank with the fault; rank 0 prepares the data
STEP = 25 if FAULT == "slow" else 2  # of the fault; the first 20 steps show the usual times


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def raising() -> None:
    raise RuntimeError("injected")


def sys_exit_0() -> None:
    sys.exit(0)


def sys_exit_3() -> None:
    sys.exit(3)


def os_exit_0() -> None:
    os._exit(0)


def os_exit_3() -> None:
    os._exit(3)


def endless_loop() -> None:
    while True:
        pass


def long() -> None:
    """Compute for longer than the timeout."""
    end = time.monotonic() + 9
    while time.monotonic() < end:
        pass


def idle() -> None:
    """Wait without end and without using the CPU."""
    threading.Event().wait()


def out_of_memory() -> None:
    """Allocate more than the address space may hold."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
    torch.ones(2**28)


def segmentation_fault() -> None:
    ctypes.string_at(0)


def missing_collective() -> None:
    """Skip the next collective over all ranks."""
    skipped, original = [], dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not skipped and kwargs.get("group") is None:
            return skipped.append(tensor)
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce


def other_shape() -> None:
    """Reduce half of the numbers in the next collective over all ranks."""
    original = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(tensor[: len(tensor) // 2] if kwargs.get("group") is None else tensor, *args, **kwargs)

    dist.all_reduce = all_reduce


def other_order() -> None:
    """Call a barrier before the next collective over all ranks."""
    dist.barrier()


def wrong_data() -> None:
    """Overwrite the shard that this rank reads with token ids that are not in the vocabulary."""
    for path in FOLDER.glob("shards/*_train_*.npy"):
        array = np.load(path, mmap_mode="r+")
        array[:] = 60_000


def truncated_data() -> None:
    for path in FOLDER.glob("shards/*_train_*.npy"):
        os.truncate(path, 128)


def folder_removed() -> None:
    os.rename(FOLDER / "run", FOLDER / "removed")


def disk_full() -> None:
    """Fill the file system of the run folder, a tmpfs."""
    with suppress(OSError), (FOLDER / "run" / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))


def read_only() -> None:
    """Mount the folder that is written to next over itself, read-only."""
    folder = FOLDER / "run" / ("checkpoints" if PLACE == "saving" else "")
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)


def slow() -> None:
    """Compute for longer than the other ranks, from now on."""
    original = Stage.forward

    def forward(*args: Any) -> Any:
        end = time.perf_counter() + 0.03
        while time.perf_counter() < end:
            math.sqrt(2)
        return original(*args)

    Stage.forward = forward  # type: ignore[method-assign]


def _launched_rank() -> int:
    return int(os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])


def inject() -> None:
    """Record the time, then inject the fault. Calls after the first have no effect."""
    if (FOLDER / "fault").exists():
        return
    (FOLDER / "fault").write_text(repr(time.time()))
    globals()[FAULT]()


def before(owner: Any, name: str, applies: Callable[..., bool] = lambda *_, **__: True) -> None:
    """Inject the fault before the calls of a function to which it applies."""
    original = getattr(owner, name)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if applies(*args, **kwargs):
            inject()
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def nan_expert() -> None:
    """Make one weight of one expert NaN."""
    for trainer in TRAINERS:
        for shard in trainer.model.shards:
            if shard.expert:
                shard.parameter.data[0].fill_(math.nan)
                return


TRAINERS: list[Trainer] = []
STEPS: list[int] = []  # of this process
VALIDATIONS: list[int] = []


def install() -> None:
    """Replace the functions of the place."""
    count = Trainer.step

    def step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        TRAINERS[:] = [self]
        STEPS.append(len(STEPS) + 1)
        return count(self, *args, **kwargs)

    Trainer.step = step  # type: ignore[method-assign]
    if PLACE == "start":
        before(loop, "set_up")
    elif PLACE == "preparation":
        before(run_data, "prepare")
    elif PLACE == "training" and FAULT in ("nan_expert", "wrong_data", "truncated_data", "slow"):
        before(Trainer, "_backward", lambda *_: len(STEPS) == STEP)
    elif PLACE == "training" and FAULT in ("missing_collective", "other_shape", "other_order"):
        before(Trainer, "_step_sums", lambda *_: len(STEPS) == STEP)
    elif PLACE == "training":
        before(Stage, "backward", lambda _, microbatch, *__: len(STEPS) == STEP and microbatch == 1)
    elif PLACE == "validation":
        before(Stage, "forward", lambda *_: len(STEPS) == STEP and not torch.is_grad_enabled())
    elif PLACE == "saving":
        before(writer, "describe")


if __name__ == "__main__":
    sys.argv[1:] = sys.argv[4:]
    mine = _launched_rank() == RANK
    if mine and PLACE != "exit":
        install()
    cli.run(main, parallel=True)
    if mine and PLACE == "exit":
        inject()
