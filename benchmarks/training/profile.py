"""Profile of a training step in one process: tokens/s, MFU, and the operators that take most of the time.

    python -m benchmarks.training.profile [THREADS]

Runs forward and backward of fira-tiny and of a fira of 21 million parameters on random tokens, in fp32 on the CPU. The
peak is measured by matrix products that alternate with the steps.
"""

import sys
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import alternate, environment, products, ratio
from fira.devices import keep_freed_memory
from fira.models.fira import FiraConfig
from fira.models.language_model import LanguageModel
from fira.models.registry import PRESETS, build
from fira.nn.context import Context, TrainingContext
from fira.parallel.microbatch_loss import microbatch_loss
from fira.parallel.parallelize import layer_flops

ROUNDS = 5
MODELS: dict[str, tuple[FiraConfig, int]] = {  # config and sequences per step
    "fira-tiny": (PRESETS["fira-tiny"], 16),
    "fira, 21M": (
        replace(PRESETS["fira-base"], vocab_size=8192, seq_len=256, d_model=384, n_head=6, num_layers=4, d_ff=1024),
        8,
    ),
}


def step(model: LanguageModel, config: Any, sequences: int) -> None:
    """Run forward and backward of a batch of random tokens, without dropout."""
    tokens = sequences * config.seq_len
    inputs, targets = torch.randint(config.vocab_size, (2, sequences, config.seq_len))
    weights = torch.full((sequences,), 1 / sequences)
    context = Context(training=TrainingContext(targets, 1 / tokens, weights))
    microbatch_loss(model(inputs, context), context)[0].backward()
    for parameter in model.parameters():
        parameter.grad = None


def measure(name: str, config: FiraConfig, sequences: int) -> None:
    """Print tokens/s, MFU and the profile of a model."""
    model = build(config)
    peak, flops = products()
    seconds = alternate({"step": lambda: step(model, config, sequences), "peak": peak}, ROUNDS)
    tokens = sequences * config.seq_len
    mfu = 3 * sum(layer_flops(model)) * tokens / flops * ratio(seconds["peak"], seconds["step"])
    speed, peak_flops = tokens / median(seconds["step"]), flops / median(seconds["peak"])
    print(f"{name}: {model.num_parameters():,} parameters, {speed:.0f} tokens/s")
    print(f"MFU {mfu:.3f} of {peak_flops / 1e9:.0f} GFLOP/s")
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step(model, config, sequences)
    print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60))


def main() -> None:
    keep_freed_memory()
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    print(environment())
    for name, (config, sequences) in MODELS.items():
        measure(name, config, sequences)


if __name__ == "__main__":
    main()
