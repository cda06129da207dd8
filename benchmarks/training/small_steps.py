"""Fixed cost of small steps, and speed of validation and perplexity relative to training, for fira-tiny.

    python -m benchmarks.training.small_steps
    PYTHONPATH=OTHER python benchmarks/training/small_steps.py    # the code of another checkout

One process and one thread. Times are those of the thread's CPU clock, which does not run while other processes use the
core; the contenders take turns.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

import pipeline
from fira.data.random_tokens import RandomTokens
from fira.devices import keep_freed_memory
from fira.doctor.one_step import make_trainer
from fira.generation.perplexity import perplexity
from fira.models.registry import PRESETS, build
from pipeline.mesh import CPU, Layout

ROUNDS = 15
LENGTH, SEQUENCES = 64, 12
TINY, MICROBATCHES = 8, 12  # tokens in a micro-batch of one sequence, and micro-batches in a step


class Validation(RandomTokens):
    def __len__(self) -> int:
        return SEQUENCES


def steps(length: int, sequences: int, microbatch: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return calls of a training step and of a validation of as many sequences."""
    config = replace(PRESETS["fira-tiny"], seq_len=length)
    trainer = make_trainer(config, Layout(), "1f1b", CPU, microbatch)
    loader = RandomTokens(config.vocab_size, length)
    validation = Validation(config.vocab_size, length)
    return lambda: trainer.step(loader, sequences, 1e-4, 0), lambda: trainer.forward.mean(validation, sequences)


def main() -> None:
    pipeline.init()
    torch.set_num_threads(1)
    keep_freed_memory()
    train, validate = steps(LENGTH, SEQUENCES, SEQUENCES)
    model = build(replace(PRESETS["fira-tiny"], seq_len=LENGTH)).eval()
    ids = torch.randint(model.config.vocab_size, (LENGTH * SEQUENCES + 1,))
    contenders = {
        "train": train,
        "validate": validate,
        "perplexity": lambda: perplexity(model, ids),
        "one": steps(TINY, 1, 1)[0],
        "many": steps(TINY, MICROBATCHES, 1)[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(ROUNDS + 1):
        for name, call in contenders.items():
            started = time.thread_time()
            call()
            if number:  # the first call warms up
                seconds[name].append(time.thread_time() - started)
    ms = {name: 1000 * median(values) for name, values in seconds.items()}
    microbatch = (ms["many"] - ms["one"]) / (MICROBATCHES - 1)
    print(f"step of {SEQUENCES} × {LENGTH} tokens: {ms['train']:.1f} ms of CPU time")
    print(f"fixed cost: {microbatch:.2f} ms per micro-batch, {ms['one'] - microbatch:.2f} ms per step")
    print(f"tokens/s of training = 1: validation {ms['train'] / ms['validate']:.2f}, ", end="")
    print(f"perplexity {ms['train'] / ms['perplexity']:.2f}")


if __name__ == "__main__":
    main()
