"""GPU checks of single operations and single steps: numbers, synchronisations, and where the time goes."""

import collections
import importlib.util
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fira.devices import AUTOCAST_DTYPES, auto_precision
from fira.doctor.gpu_check import Target, run_program
from fira.doctor.one_step import RandomTokens, make_trainer
from fira.models.registry import PRESETS
from fira.nn.dropout import at_place, random_bits, salt, token_keys
from fira.nn.moe.grouped_linear import RowGroups, grouped_linear
from fira.training.trainer import Trainer
from pipeline.mesh import Layout
from pipeline.mpi import init

BF16_ERROR = 2**-6  # relative to the largest element; bf16 rounds by 2⁻⁹, and sums of 614 products add up errors

SHOWN_KERNELS = 15


def grouped_product(target: Target) -> str:
    """`grouped_linear` in bf16 against products per expert in float64: an empty expert, ragged rows, odd widths."""
    errors = []
    for inputs, outputs, ragged in ((64, 128, False), (128, 64, True), (128, 614, True), (614, 128, False)):
        generator = torch.Generator().manual_seed(inputs)
        counts = torch.tensor([5, 0, 17, 40])  # rows of each expert
        rows = int(counts.sum()) + (3 if ragged else 0)
        shapes = ((rows, inputs), (4, outputs, inputs), (4, outputs), (rows, outputs))
        values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        x, weight, bias = (v.detach().to(target.device).requires_grad_() for v in values[:3])
        y = grouped_linear(x, RowGroups(counts.to(target.device), ragged=ragged), weight, bias)
        y.backward(values[3].to(target.device))
        expected = _plain_product(values, counts.tolist())
        for got, want in zip((y.detach(), x.grad, weight.grad, bias.grad), expected, strict=True):
            assert got is not None
            error = float((got.cpu().double() - want).abs().max() / want.abs().max())
            assert error < BF16_ERROR, f"{inputs} → {outputs}, ragged {ragged}: relative error {error:.1e}"
            errors.append(error)
    return f"forward and backward, largest relative error {max(errors):.1e}"


def _plain_product(values: list[Tensor], counts: list[int]) -> tuple[Tensor, ...]:
    """y and the gradients of x, weight and bias, one product per expert, in float64 on the CPU."""
    x, weight, bias, grad_y = (value.double() for value in values)
    y, grad_x = torch.zeros_like(grad_y), torch.zeros_like(x)
    grad_weight, grad_bias, start = torch.zeros_like(weight), torch.zeros_like(bias), 0
    for e, count in enumerate(counts):
        rows = slice(start, start := start + count)
        y[rows] = x[rows] @ weight[e].T + bias[e]
        grad_x[rows] = grad_y[rows] @ weight[e]
        grad_weight[e], grad_bias[e] = grad_y[rows].T @ x[rows], grad_y[rows].sum(0)
    return y, grad_x, grad_weight, grad_bias


def dropout_bits(target: Target) -> str:
    """The hash of dropout and routing noise is bitwise identical on the CPU and on the device."""
    keys = torch.tensor([0, 1, 2**61 + 12345])

    def bits(device: str) -> Tensor:
        rows = at_place(token_keys(keys.to(device), 7, 100), salt("layers.3.attention.dropout"))
        return random_bits(rows, 614).cpu()

    different = int((bits("cpu") != bits(target.device)).sum())
    assert different == 0, f"{different} of {3 * 100 * 614} values differ"
    return f"{3 * 100 * 614:,} values are identical"


def synchronisations(target: Target) -> str:
    """Where one step of fira-tiny makes the host wait for the device, with the number of times."""
    if target.device == "cpu":
        return "a CPU has no synchronisations"
    trainer, loader, sequences = _one_rank("fira-tiny", torch.device("cuda", 0), dropout=0.1)
    trainer.step(loader, sequences, 1e-4, 0)  # the first step compiles and allocates
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        trainer.step(loader, sequences, 1e-4, 0)
        torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter(
        f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
    )
    lines = [f"{count:6} {place}" for place, count in places.most_common()]
    return "\n".join([f"{places.total()} in a step, at {len(places)} places", *lines])


def profile(target: Target, dropout: str) -> str:
    """One step of fira-base (on the CPU: fira-tiny): tokens per second, kernels per layer, and the slowest kernels."""
    device = torch.device(target.device, 0) if target.device == "cuda" else torch.device("cpu")
    preset = "fira-base" if device.type == "cuda" else "fira-tiny"
    trainer, loader, sequences = _one_rank(preset, device, float(dropout))
    for _ in range(3):
        started = time.perf_counter()
        trainer.step(loader, sequences, 1e-4, 0)  # ends with a synchronisation: the loss is read
        seconds = time.perf_counter() - started
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        trainer.step(loader, sequences, 1e-4, 0)
    averages = profiler.key_averages()
    times = [(e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key) for e in averages]
    kernels = sorted(((time, count, key) for time, count, key in times if time > 0), reverse=True)
    layers, tokens = len(trainer.model.moe_layers), sequences * trainer.model.config.seq_len
    flops = 3 * trainer.model.flops_per_token * tokens / seconds / 1e12
    launched = sum(count for _, count, _ in kernels) / layers
    figures = f"{tokens / seconds:,.0f} tokens/s, {flops:.1f} TFLOP/s, {launched:.0f} kernels per layer and step"
    slowest = [f"{time / 1e3:10.2f} ms {count:6} × {key[:90]}" for time, count, key in kernels[:SHOWN_KERNELS]]
    return "\n".join([f"{preset}, {auto_precision(device)}: {figures}", *slowest])


def _one_rank(preset: str, device: torch.device, dropout: float) -> tuple[Trainer, RandomTokens, int]:
    """A trainer on one rank in the precision of the device, a loader, and the number of sequences of a step."""
    init()
    config = replace(PRESETS[preset], dropout=dropout)
    autocast = AUTOCAST_DTYPES.get(auto_precision(device))
    microbatch = max(1, (4096 if device.type == "cuda" else 256) // config.seq_len)
    trainer = make_trainer(config, Layout(), "1f1b", device, microbatch, autocast)
    return trainer, RandomTokens(config.vocab_size, config.seq_len), 2 * microbatch


def benchmark(target: Target) -> str:
    """`benchmarks.gpu.run`, which a checkout contains and an installed package does not."""
    if importlib.util.find_spec("benchmarks") is None:
        return "not run: start this command in the folder of a checkout to include the benchmark"
    table = run_program([sys.executable, "-m", "benchmarks.gpu.run", "--device", target.device])
    return f"see the table\n{table}"
