"""Benchmarks on one or two GPUs: MFU of training, overhead of the engine and of torchgpipe, MoE layer, two ranks.

    python -m benchmarks.gpu.run                    # one rank
    mpirun -np 2 python -m benchmarks.gpu.run       # two ranks: on two GPUs with NCCL, or sharing one through the host
    python -m benchmarks.gpu.run --device cpu       # a tiny model, to test the benchmark only

Products are in the precision that `--precision auto` selects: bf16 from sm_80 on, fp16 on a T4.
Writes results.csv: medians of contenders that take turns in one run.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import pipeline
from benchmarks.measure import alternate, merge, ratio
from fira.data.random_tokens import RandomTokens
from fira.devices import AUTOCAST_DTYPES, auto_precision, choose_devices
from fira.doctor.one_step import make_trainer
from fira.models.registry import PRESETS, build
from fira.nn.context import Context, TrainingContext
from fira.nn.mlp import GatedMLP
from fira.nn.moe.experts import GatedExperts
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Router
from fira.parallel.microbatch_loss import microbatch_loss
from fira.parallel.parallelize import layer_flops
from fira.parallel.pipeline_model import create_pipeline_model
from pipeline.mesh import Layout

HERE = Path(__file__).parent
Run = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """dtype: of the products. preset and changes: the model. microbatch: sequences of each of the four micro-batches.

    product: rows and columns of the factors that measure the peak. layer: width and hidden width of the experts, and
    sequences and tokens of their input. rounds: in which the contenders take turns.
    """

    device: torch.device
    dtype: torch.dtype
    preset: str
    changes: dict[str, int]
    microbatch: int
    product: int
    layer: tuple[int, int, int, int]
    rounds: int

    @property
    def sequences(self) -> int:
        return 4 * self.microbatch


def choose_setting(device: torch.device, layers: int, microbatch: int) -> Setting:
    """Return the setting of a device. layers, microbatch: of fira-base on a GPU; on a CPU everything is tiny."""
    dtype = AUTOCAST_DTYPES.get(auto_precision(device), torch.bfloat16)
    if device.type == "cuda":
        return Setting(device, dtype, "fira-base", {"num_layers": layers}, microbatch, 8192, (2048, 4096, 8, 1024), 11)
    changes = {"num_layers": 2, "d_model": 32, "d_ff": 64, "seq_len": 16, "vocab_size": 64}
    return Setting(device, dtype, "fira-tiny", changes, 2, 64, (32, 64, 2, 8), 2)


def peak(setting: Setting) -> tuple[Run, float]:
    """Return a call of a product of two n × n matrices, and its FLOPs."""
    n = setting.product
    a, b = torch.randn(2, n, n, device=setting.device, dtype=setting.dtype)
    return lambda: a @ b, 2.0 * n**3


def plain(model: nn.Module, config: Any, setting: Setting) -> Run:
    """Return a step of a plain training loop: micro-batches through the whole model, then torch's AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loader = RandomTokens(config.vocab_size, config.seq_len)
    sequences, microbatch, device = setting.sequences, setting.microbatch, setting.device

    def run() -> None:
        batch = loader.batch(0, sequences)
        inputs, targets = (torch.from_numpy(part).to(device).split(microbatch) for part in batch[:2])
        for x, y in zip(inputs, targets, strict=True):
            weights = torch.full((microbatch,), 1 / sequences, device=device)
            context = Context(training=TrainingContext(y, 1 / (sequences * config.seq_len), weights))
            with torch.autocast(device.type, setting.dtype):
                hidden = model(x, context)
            microbatch_loss(hidden, context)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def ours(config: Any, layout: Layout, setting: Setting) -> Run:
    """Return a step of our trainer."""
    trainer = make_trainer(config, layout, "1f1b", setting.device, setting.microbatch, setting.dtype)
    loader = RandomTokens(config.vocab_size, config.seq_len)
    return lambda: trainer.step(loader, setting.sequences, 1e-4, 0, [])


def expert_layers(experts: int, top_k: int, setting: Setting) -> dict[str, Run]:
    """Return forward and backward of an MoE layer and of a dense layer of equal active FLOPs."""
    (width, hidden, rows, length), device = setting.layer, setting.device
    moe = MoE(Router(width, experts, top_k, bias=False), GatedExperts(experts, width, hidden, F.silu), experts, 1, [])
    dense = GatedMLP(width, top_k * hidden, nn.Linear)
    for parameter in [*moe.to(device).parameters(), *dense.to(device).parameters()]:
        nn.init.normal_(parameter, std=0.02)
    x = torch.randn(rows, length, width, device=device, requires_grad=True)

    def step(layer: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.autocast(device.type, setting.dtype):
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


def measure(
    contenders: dict[str, Run], base: str, flops: dict[str, float], setting: Setting
) -> list[dict[str, object]]:
    """Return a row per contender: milliseconds, speed relative to `base`, and MFU relative to the measured peak."""
    product, product_flops = peak(setting)
    runs = {name: synchronised(run, setting.device) for name, run in (contenders | {"peak": product}).items()}
    seconds = alternate(runs, setting.rounds)
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


def measure_training(ranks: int, config: Any, setting: Setting) -> list[dict[str, object]]:
    """Return the rows of training steps. MFU relates to the FLOPs and the peak of one GPU."""
    flops = 3 * sum(layer_flops(build(config))) * setting.sequences * config.seq_len
    if ranks > 1:
        layouts = [Layout(ranks, 1, 1), Layout(1, ranks, ranks)]
        contenders = {f"our engine, {layout}": ours(config, layout, setting) for layout in layouts}
        return measure(contenders, next(iter(contenders)), dict.fromkeys(contenders, flops / ranks), setting)
    device = setting.device
    count = min(2, torch.cuda.device_count()) if device.type == "cuda" else 1
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)] if count == 2 else [device, device]
    parts = create_pipeline_model(build(config), devices, chunks=2, autocast=setting.dtype)
    split = f"torchgpipe, two partitions on {count} device{'s' * (count > 1)}"
    contenders = {
        "plain loop": plain(build(config).to(device), config, setting),
        f"our engine, {Layout()}": ours(config, Layout(), setting),
        split: plain(parts, config, setting),
    }
    flops_per_device = dict.fromkeys(contenders, flops) | {split: flops / count}
    return measure(contenders, "plain loop", flops_per_device, setting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, default=12, help="blocks of fira-base; 4 fit on a GPU with 16 GB")
    parser.add_argument("--microbatch", type=int, default=32, help="sequences of 512 tokens; 8 fit on a GPU with 16 GB")
    options = parser.parse_args()
    world = pipeline.init()
    device = choose_devices(options.device, None, world.local_rank)[0]
    setting = choose_setting(device, options.layers, options.microbatch)
    config = replace(PRESETS[setting.preset], dropout=0.0, **setting.changes)
    rows = measure_training(world.size, config, setting)
    if world.size == 1:
        for experts, top_k in ((8, 2), (64, 2)):
            rows += measure(expert_layers(experts, top_k, setting), "dense layer", {}, setting)
    if world.rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        common = {"device": name, "dtype": str(setting.dtype).removeprefix("torch."), "layers": config.num_layers}
        rows = [{**common, "ranks": world.size, **row} for row in rows]
        path = HERE / "results.csv" if device.type == "cuda" else Path("gpu-check.csv")
        print(merge(path, rows, [*common, "ranks", "contender"]).to_string())


if __name__ == "__main__":
    main()
