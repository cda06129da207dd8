"""CPU time of a save, in the training thread and in the background, which can be measured on a busy machine as well.

    mpirun -np 2 python -m benchmarks.checkpoints.cpu_time fira-tiny

Every rank has one thread for the copies. Prints medians over the saves, for the rank with the largest sum.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

import pipeline
from benchmarks.checkpoints.ranks import LAYOUTS, MODELS
from fira.checkpoint.writer import CheckpointWriter
from fira.data.random_tokens import RandomTokens
from fira.devices import keep_freed_memory
from fira.doctor.one_step import make_trainer
from fira.training import state
from fira.training.trainer import Trainer
from pipeline.mesh import CPU

SAVES = 8


def measure(trainer: Trainer, loader: RandomTokens, folder: Path) -> list[float]:
    """Return the medians of a save in ms on this rank: copy, exchanges of the training thread, background."""
    writer = CheckpointWriter(folder, keep=2)
    rows = []
    for step in range(1, SAVES + 1):
        main, process = time.thread_time(), time.process_time()
        state.save(writer, step, trainer, loader, None, settings={})
        copied = time.thread_time()
        writer.finish()
        finished = time.thread_time()
        background = time.process_time() - process - (finished - main)
        rows.append((copied - main, finished - copied, background))
    return [1000 * median(column) for column in zip(*rows[1:], strict=True)]  # the first one allocates the memory


def main() -> None:
    world = pipeline.init()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        for name in sys.argv[1:]:
            config, _ = MODELS[name]
            trainer = make_trainer(config, LAYOUTS[world.size], "1f1b", CPU)
            rows: list[list[float]] = [[]] * world.size
            loader = RandomTokens(config.vocab_size, config.seq_len)
            dist.all_gather_object(rows, measure(trainer, loader, Path(folder[0], name)))
            if world.rank == 0:
                copy, exchange, background = max(rows, key=sum)
                print(f"| {world.size} | {name} | {copy:.1f} | {exchange:.1f} | {background:.0f} |")


if __name__ == "__main__":
    main()
