"""Devices of a rank, dtypes by precision, and the measured peak FLOP/s, which is the reference of MFU."""

import ctypes
import time

import torch
import torch.distributed as dist

from fira.errors import UserError

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by --precision; fp32 and fp64 do not use autocast
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # constants of <malloc.h>


def choose_devices(device: str, local_devices: str | None, local_rank: int) -> list[torch.device]:
    """Devices of this rank: `local_devices` if given, else one CUDA device chosen by local rank, or the CPU.

    Raises UserError if a name is invalid, a device does not exist, or the devices are of several types.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu")
    if local_devices:
        try:
            devices = [torch.device(name.strip()) for name in local_devices.split(",")]
        except RuntimeError:
            raise UserError(f"--local-devices {local_devices}: give devices such as cuda:0,cuda:1 or cpu,cpu") from None
        if len({d.type for d in devices}) > 1:
            raise UserError(f"--local-devices {local_devices}: give devices of one type")
        if any(d.type == "cuda" and (d.index or 0) >= torch.cuda.device_count() for d in devices):
            raise UserError(f"--local-devices {local_devices}: there are {torch.cuda.device_count()} CUDA devices")
        return devices
    if device == "cpu" or not torch.cuda.is_available():
        return [torch.device("cpu")]
    return [torch.device("cuda", local_rank % torch.cuda.device_count())]


def keep_freed_memory() -> None:
    """Let glibc keep freed memory in the process, so that the tensors of the next micro-batch reuse mapped pages.

    By default glibc maps every large tensor again, and the kernel clears its pages at first access, which takes 10 to
    20 % of a step on a CPU. Without glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of large matrix products, measured by all ranks at the same time and summed over them (collective)."""
    n = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = a @ b
    dist.barrier()
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or done < 2:
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += 1
    peak = torch.tensor([2.0 * n**3 * done / elapsed], dtype=torch.float64)
    dist.all_reduce(peak)
    return float(peak)


def parameter_dtype(precision: str) -> torch.dtype:
    """Dtype of the parameters and of the tensors between stages for a value of --precision."""
    return torch.float64 if precision == "fp64" else torch.float32


def auto_precision(device: torch.device) -> str:
    """The precision that `--precision auto` selects: the fastest one that the device does not emulate."""
    if device.type != "cuda":
        return "fp32"
    capability = torch.cuda.get_device_capability(device)
    return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
