"""Number of torch operators per step and per micro-batch of fira-tiny in one process.

    python -m benchmarks.training.operators

An operator takes about the same time for 8 and for 100 tokens, so these numbers are the fixed cost of small steps.
Unlike times, they do not depend on what else the machine does. Views count as well.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pipeline
from fira.data.random_tokens import RandomTokens
from fira.doctor.one_step import make_trainer
from fira.models.registry import PRESETS
from pipeline.mesh import CPU, Layout

TOKENS = 8  # in a micro-batch of one sequence


class Operators(TorchDispatchMode):
    """Counts the operators that are called, also in backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(microbatches: int) -> Counter[str]:
    """Return the operators of the second step of a new model, by name."""
    config = replace(PRESETS["fira-tiny"], seq_len=TOKENS)
    trainer = make_trainer(config, Layout(), "1f1b", CPU)
    loader = RandomTokens(config.vocab_size, TOKENS)
    trainer.step(loader, microbatches, 1e-4, 0)
    with Operators() as operators:
        trainer.step(loader, microbatches, 1e-4, 0)
    return operators.calls


def counts() -> tuple[Counter[str], Counter[str]]:
    """Return the operators of a step without those of its micro-batches, and of a micro-batch."""
    one, two = count(1), count(2)
    return one - (two - one), two - one


def main() -> None:
    pipeline.init()
    torch.set_num_threads(1)
    for unit, calls in zip(("step", "micro-batch"), counts(), strict=True):
        most = ", ".join(f"{name.removeprefix('aten.')} {number}" for name, number in calls.most_common(12))
        print(f"per {unit}: {calls.total()} operators ({most})")


if __name__ == "__main__":
    main()
