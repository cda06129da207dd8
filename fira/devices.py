"""Devices of a rank, the precision that suits them, and the measured peak FLOP/s, which is the reference of MFU."""

import ctypes
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from fira.errors import UserError

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by --precision; fp32 and fp64 do not use autocast
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # constants of <malloc.h>
AUTO_PRECISIONS = ("fp32", "fp16", "bf16")  # in ascending order of the hardware that they need
CPU_INSTRUCTIONS = {  # by precision: flags in /proc/cpuinfo of which a CPU with matrix products in it has one
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
PRODUCTS = {"cpu": 1, "cuda": 16}  # matrix products that `measure_peak` starts before it waits for the devices

logger = logging.getLogger(__name__)


def choose_devices(device: str, local_devices: str | None, local_rank: int = 0) -> list[torch.device]:
    """Devices of this rank: its part of `local_devices` if given, else a CUDA device chosen by local rank, or the CPU.

    The CUDA devices of `local_devices` are divided between the ranks that see the same devices (collective). A rank to
    which the launcher has given devices of its own uses all of the named ones. CPU devices are not divided, because
    they are all the same one. The first CUDA device becomes the current device of the process, so that no library
    creates a context on device 0. Without CUDA devices, CUDA is not initialised.
    Raises UserError if a name is invalid, a device does not exist, the devices are of several types, or the ranks
    cannot share them equally.
    """
    devices = _named_devices(local_devices) if local_devices else None
    if devices is None:
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device; use --device cpu")
        if device == "cpu" or not torch.cuda.is_available():
            return [torch.device("cpu")]
        devices = [torch.device("cuda", local_rank % torch.cuda.device_count())]
    if devices[0].type == "cuda":
        torch.cuda.set_device(devices[0])
    return devices


def _named_devices(names: str) -> list[torch.device]:
    """This rank's devices of a comma-separated list."""
    try:
        devices = [torch.device(name.strip()) for name in names.split(",")]
    except RuntimeError:
        raise UserError(f"--local-devices {names}: give devices such as cuda:0,cuda:1 or cpu,cpu") from None
    if len({d.type for d in devices}) > 1 or devices[0].type not in ("cpu", "cuda"):
        raise UserError(f"--local-devices {names}: give devices of one type, cpu or cuda")
    if devices[0].type != "cuda":
        return devices
    devices, visible = [torch.device("cuda", d.index or 0) for d in devices], torch.cuda.device_count()
    if any(d.index >= visible for d in devices):
        raise UserError(f"--local-devices {names}: torch sees {visible} CUDA device{'s' * (visible != 1)}")
    position, sharing = _rank_among_sharing()
    count = len(devices) // sharing
    if count * sharing != len(devices):
        raise UserError(
            f"--local-devices {names}: the {sharing} ranks that see these devices cannot share {len(devices)} equally; "
            "give a multiple of the number of ranks"
        )
    return devices[position * count : (position + 1) * count]


def _rank_among_sharing() -> tuple[int, int]:
    """The position of this rank among the ranks that see the same CUDA devices, and their number (collective).

    Slurm's --gpus-per-task, for example, gives each rank devices of its own, which all ranks call cuda:0, cuda:1, ….
    The identifiers of the devices differ even where CUDA_VISIBLE_DEVICES does not. Reading them creates no context.
    """
    own = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    by_rank: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(by_rank, own)
    sharing = [rank for rank, visible in enumerate(by_rank) if visible == own]
    return sharing.index(dist.get_rank()), len(sharing)


def auto_precision(device: torch.device) -> str:
    """The fastest precision with a sufficient range: bf16 from sm_80, fp16 on sm_70 and sm_75, otherwise fp32."""
    if device.type != "cuda":
        return "fp32"
    capability = torch.cuda.get_device_capability(device)
    return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"


def choose_precision(precision: str, devices: Sequence[torch.device]) -> str:
    """The precision of all ranks: the given one, or for "auto" the least of all devices' (collective).

    devices: of this rank. Rank 0 warns if a device of any rank emulates the precision.
    """
    least = min(AUTO_PRECISIONS.index(auto_precision(device)) for device in devices)
    levels = torch.tensor([least, *(-any(_emulates(d, name) for d in devices) for name in AUTO_PRECISIONS)])
    dist.all_reduce(levels, dist.ReduceOp.MIN)
    if precision == "auto":
        precision = AUTO_PRECISIONS[levels[0]]
    if dist.get_rank() == 0 and precision in AUTO_PRECISIONS and levels[1 + AUTO_PRECISIONS.index(precision)] < 0:
        logger.warning(
            "precision %s: the %s has no instructions for it and emulates it slowly; give --precision %s",
            *(precision, devices[0].type.upper(), AUTO_PRECISIONS[levels[0]]),
        )
    return precision


def _emulates(device: torch.device, precision: str) -> bool:
    """Whether a device has no instructions for products in a precision."""
    if precision == "fp32":
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) < ((8, 0) if precision == "bf16" else (7, 0))
    description = Path("/proc/cpuinfo")
    return description.exists() and not CPU_INSTRUCTIONS[precision] & set(description.read_text().split())


def keep_freed_memory() -> None:
    """Let glibc keep freed memory in the process, so that the tensors of the next micro-batch reuse mapped pages.

    By default glibc maps every large tensor again, and the kernel clears its pages at first access, which takes 10 to
    20 % of a step on a CPU. Without glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def measure_peak(devices: Sequence[torch.device], dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of large matrix products on all devices of all ranks, which measure at the same time (collective).

    devices: of this rank; several CPU devices are one.
    """
    n = 4096 if devices[0].type == "cuda" else 1024
    factors = [[torch.randn(n, n, device=device, dtype=dtype) for _ in range(2)] for device in dict.fromkeys(devices)]
    operands = [(a, b, a @ b) for a, b in factors]
    _synchronise(devices)
    dist.barrier()
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or done < 2:
        for _ in range(PRODUCTS[devices[0].type]):
            for a, b, out in operands:
                torch.mm(a, b, out=out)
            done += 1
        _synchronise(devices)
    peak = torch.tensor([2.0 * n**3 * done * len(operands) / elapsed], dtype=torch.float64)
    dist.all_reduce(peak)
    return float(peak)


def _synchronise(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def parameter_dtype(precision: str) -> torch.dtype:
    """Dtype of the parameters and of the tensors between stages for a value of --precision."""
    return torch.float64 if precision == "fp64" else torch.float32
