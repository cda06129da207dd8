"""Benchmarks on one GPU: MFU of training in bf16, overhead of the engine and of torchgpipe, MoE layer, two ranks.

    python -m benchmarks.gpu.run                    # one rank
    mpirun -np 2 python -m benchmarks.gpu.run       # two ranks share the GPU: messages through the host
    python -m benchmarks.gpu.run --device cpu       # a small model, to test the benchmark only

Writes results.csv: medians of contenders that take turns in one run.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import pipeline
from benchmarks.measure import alternate, merge, ratio
from fira.doctor.one_step import RandomTokens, make_trainer
from fira.models.language_model import LanguageModel
from fira.models.registry import PRESETS, build
from fira.nn.context import Context, TrainingContext
from fira.nn.mlp import GatedMLP
from fira.nn.moe.experts import GatedExperts
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Router
from fira.parallel.objective import objective
from fira.parallel.parallelize import layer_flops
from fira.parallel.pipeline_model import create_pipeline_model
from pipeline.mesh import Layout

HERE = Path(__file__).parent
ROUNDS = 11
# Sequences of a batch and of a micro-batch. On a GPU the latter has 16,384 tokens; with fewer, launches take longer.
SIZES = {"cuda": (128, 32), "cpu": (32, 8)}
Run = Callable[[], object]


def peak(device: torch.device) -> tuple[Run, float]:
    """Return a call of a matrix product in bf16, and its FLOPs."""
    n = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    return lambda: a @ b, 2.0 * n**3


def plain(model: nn.Module, config: Any, device: torch.device) -> Run:
    """Return a step of a plain training loop: micro-batches through the whole model, then torch's AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loader = RandomTokens(config.vocab_size, config.seq_len)
    sequences, microbatch = SIZES[device.type]

    def run() -> None:
        batch = loader.batch(0, sequences)
        inputs, targets = (torch.from_numpy(part).to(device).split(microbatch) for part in batch)
        for x, y in zip(inputs, targets, strict=True):
            weights = torch.full((microbatch,), 1 / sequences, device=device)
            context = Context(training=TrainingContext(y, 1 / (sequences * config.seq_len), weights))
            with torch.autocast(device.type, torch.bfloat16):
                hidden = model(x, context)
            objective(hidden, context)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def ours(config: Any, layout: Layout, device: torch.device) -> Run:
    sequences, microbatch = SIZES[device.type]
    trainer = make_trainer(config, layout, "1f1b", device, microbatch, torch.bfloat16)
    loader = RandomTokens(config.vocab_size, config.seq_len)
    return lambda: trainer.step(loader, sequences, 1e-4, 0, [])


def expert_layers(device: torch.device, experts: int, top_k: int) -> dict[str, Run]:
    """Return forward and backward of an MoE layer and of a dense layer of equal active FLOPs, in bf16."""
    width, hidden, rows, length = (2048, 4096, 8, 1024) if device.type == "cuda" else (64, 128, 2, 32)
    moe = MoE(Router(width, experts, top_k, bias=False), GatedExperts(experts, width, hidden, F.silu), experts, 1, [])
    dense = GatedMLP(width, top_k * hidden, nn.Linear)
    for parameter in [*moe.to(device).parameters(), *dense.to(device).parameters()]:
        nn.init.normal_(parameter, std=0.02)
    x = torch.randn(rows, length, width, device=device, requires_grad=True)

    def step(layer: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            y = layer(x)
        y.sum().backward()

    return {
        "dense layer": lambda: step(dense),
        f"MoE layer, {experts} experts, top {top_k}": lambda: step(
            lambda x: moe(x, Context(training=TrainingContext(aux_weights=torch.ones(rows, device=device))), None)
        ),
    }


def synchronised(run: Run, device: torch.device) -> Run:
    """Return a run that waits until the device has finished."""

    def call() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def measure(contenders: dict[str, Run], base: str, flops: dict[str, float], device: torch.device) -> list[dict]:
    """Return a row per contender: milliseconds, speed relative to `base`, and MFU relative to the measured peak."""
    product, product_flops = peak(device)
    runs = {name: synchronised(run, device) for name, run in (contenders | {"peak": product}).items()}
    seconds = alternate(runs, ROUNDS)
    return [
        {
            "contender": name,
            "ms": median(seconds[name]) * 1e3,
            "speed": ratio(seconds[base], seconds[name]),
            "mfu": flops[name] / product_flops * ratio(seconds["peak"], seconds[name]) if name in flops else None,
            "peak_tflops": product_flops / median(seconds["peak"]) / 1e12,
        }
        for name in contenders
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    world = pipeline.init()
    config = replace(PRESETS["fira-base" if device.type == "cuda" else "fira-tiny"], dropout=0.0)
    layouts = [Layout(1, 1, 1)] if world.size == 1 else [Layout(world.size, 1, 1), Layout(1, world.size, world.size)]
    contenders = {f"our engine, {layout}": ours(config, layout, device) for layout in layouts}
    base = next(iter(contenders))
    if world.size == 1:
        base = "plain loop"
        model: LanguageModel = build(config).to(device)
        contenders[base] = plain(model, config, device)
        parts = create_pipeline_model(build(config), [device, device], chunks=2, autocast=torch.bfloat16)
        contenders["torchgpipe, two partitions"] = plain(parts, config, device)
    tokens = SIZES[device.type][0] * config.seq_len
    step_flops = 3 * sum(layer_flops(build(config))) * tokens / world.size  # per rank, like the peak
    rows = measure(contenders, base, dict.fromkeys(contenders, step_flops), device)
    if world.size == 1:
        for experts, top_k in ((8, 2), (64, 2)):
            rows += measure(expert_layers(device, experts, top_k), "dense layer", {}, device)
    if world.rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        rows = [{"device": name, "ranks": world.size} | row for row in rows]
        path = HERE / "results.csv" if device.type == "cuda" else Path("gpu-check.csv")
        print(merge(path, rows, ["device", "ranks", "contender"]).to_string())


if __name__ == "__main__":
    main()
