"""Timing shared by the benchmarks: alternating calls of the contenders, medians, and a CSV of results."""

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call after one warm-up call; every second round runs in reverse order."""
    for call in contenders.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name in list(contenders)[:: 1 if i % 2 == 0 else -1]:
            started = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(over: Iterable[float], under: Iterable[float]) -> float:
    """Return the median of the ratios within each round, because a temporary slowdown affects both contenders."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def peak_allocated(call: Callable[[], object]) -> int:
    """Return the largest number of bytes that torch allocates in a call in addition, as reported by its profiler."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
    return int(max(e["args"]["Total Allocated"] for e in memory) - before)


def maximum(value: float) -> float:
    """Return the largest value of all ranks (collective)."""
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def products(n: int = 1024, count: int = 20) -> tuple[Callable[[], object], float]:
    """Return a call of matrix products, which measures the machine's peak, and its FLOPs."""
    a, b = torch.randn(2, n, n)
    out = torch.empty(n, n)

    def call() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    return call, 2.0 * n**3 * count


def merge(path: Path, rows: list[dict[str, object]], keys: list[str]) -> pd.DataFrame:
    """Write rows to a CSV, replacing rows with equal keys, so that a benchmark can be run in parts."""
    frame = pd.DataFrame(rows)
    if path.exists():
        frame = pd.concat([pd.read_csv(path), frame])
    frame = frame.drop_duplicates(keys, keep="last").sort_values(keys)
    frame.to_csv(path, index=False, float_format="%.5g")
    return frame


def environment() -> str:
    """Return one line that describes this machine, for a README."""
    return f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
