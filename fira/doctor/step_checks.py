"""GPU checks of one training step: where the host waits, and where the time goes."""

import collections
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from fira.data.random_tokens import RandomTokens
from fira.devices import AUTOCAST_DTYPES, auto_precision
from fira.doctor.gpu_check import Target
from fira.doctor.one_step import make_trainer
from fira.models.registry import PRESETS
from fira.training.trainer import Trainer
from pipeline.mesh import Layout
from pipeline.mpi import init

SHOWN_KERNELS = 15


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
