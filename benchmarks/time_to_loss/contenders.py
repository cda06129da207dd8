"""The contenders of the records: each trains with a seed and yields (step, seconds of training, validation loss)."""

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.time_to_loss.dense_gpt import Setting, train
from benchmarks.time_to_loss.shakespeare import write_shards
from fira.metrics.csv_log import LOG_NAME, read_log

Measurement = tuple[int, float, float]
Contender = Callable[[int], Iterator[Measurement]]
ROOT = Path(__file__).parents[2]

ADAMW = ("--optimizer", "adamw", "--lr", "1.6e-2", "--min-lr", "4e-4")
CHARACTERS = "--model blues-tiny --batch-size 16 --steps 240 --lr 2e-2 --min-lr 4e-4 --warmup 10"
TUNED = {"lr": 4e-3, "warmup": 50, "steps": 1300}  # of the dense GPT


def corpus() -> Mapping[str, Contender]:
    """The command of the main README, with AdamW, and as a dense model with equal FLOPs per token."""
    return {
        "default: Muon, 4 experts": partial(fira, 4, 128, ()),
        "AdamW": partial(fira, 4, 128, ADAMW),
        "dense": partial(fira, 4, 128, ("--model-set", "num_experts=1,top_k=1,d_ff=512")),
    }


def characters(text: Path) -> Mapping[str, Contender]:
    """Tiny Shakespeare: a plain dense GPT with two settings, and blues-tiny with one and four ranks."""
    folder = Path(tempfile.mkdtemp())
    vocab = write_shards(text, folder)
    training, validation = (
        torch.from_numpy(np.load(folder / f"shakespeare_{part}_000.npy").astype(np.int64)) for part in ("train", "val")
    )
    flags = ("--data", str(folder), "--vocab-size", str(vocab), "--seq-len", "64", *CHARACTERS.split())
    flags += ("--eval-sequences", str((len(validation) - 1) // 64))
    return {
        "dense GPT": lambda seed: train(Setting(vocab), training, validation, seed),
        "dense GPT, tuned": lambda seed: train(Setting(vocab, **TUNED), training, validation, seed),
        "blues-tiny, 1 rank": partial(fira, 1, 64, flags),
        "blues-tiny, 4 ranks": partial(fira, 4, 64, flags),
    }


def fira(ranks: int, seq_len: int, flags: tuple[str, ...], seed: int) -> Iterator[Measurement]:
    """Train with train.py. seq_len: that of the run, by which its tokens/s become seconds."""
    launcher = ["mpirun", "-np", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [*launcher, sys.executable, str(ROOT / "scripts" / "train.py"), *flags]
        subprocess.run([*command, "--seed", str(seed), "--out", str(out), "--quiet"], check=True, cwd=ROOT)
        batch = tomllib.loads((out / "config.toml").read_text())["batch_size"]
        log = read_log(out / LOG_NAME)
    seconds = (batch * seq_len / log["tokens_per_s"]).cumsum()
    for row in log.index[log["val_loss"].notna()]:
        yield int(log["iter"][row]), float(seconds[row]), float(log["val_loss"][row])
