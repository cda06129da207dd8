"""Facts about torch, its GPUs and Triton: `python -m fira.doctor.device_probe` prints them as JSON.

They are gathered in a process of their own, because a broken driver may crash or stop the process that asks it.
"""

import ctypes
import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

KERNEL_MODULE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device. free, total: bytes of memory. precision: what `--precision auto` selects on it."""

    name: str
    capability: Sequence[int]
    free: int
    total: int
    precision: str


@dataclass(frozen=True)
class DeviceFacts:
    """torch: its version. cuda: of torch's build, such as "12.6"; None: a build without CUDA. architectures: that the
    build has kernels for, such as sm_90. driver: newest CUDA that the driver supports, as 1000 major + 10 minor; None
    without driver. error: why torch cannot use the GPUs. peers[i][j]: whether GPU i reads the memory of GPU j.
    nccl, triton: versions, None if missing. compiler: path of the C compiler that Triton uses, or None.
    """

    torch: str
    cuda: str | None
    architectures: Sequence[str]
    driver: int | None
    driver_release: str
    error: str
    gpus: Sequence[Gpu]
    peers: Sequence[Sequence[bool]]
    nccl: str | None
    triton: str | None
    compiler: str | None


def probe() -> DeviceFacts:
    """Gather the facts; creates a CUDA context on each device if there are any."""
    import torch

    from fira.devices import auto_precision

    gpus, peers, error = [], [], ""
    try:
        if torch.version.cuda and driver_version():
            torch.cuda.init()  # raises with the reason, which is_available() does not tell
        count = torch.cuda.device_count()
        for i in range(count):
            free, total = torch.cuda.mem_get_info(i)
            name, capability = torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)
            gpus.append(Gpu(name, capability, free, total, auto_precision(torch.device("cuda", i))))
            peers.append([i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)])
    except (RuntimeError, AssertionError) as failure:
        error = str(failure).strip().splitlines()[0]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    return DeviceFacts(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        architectures=torch.cuda.get_arch_list(),
        driver=driver_version(),
        driver_release=_kernel_module(),
        error=error,
        gpus=gpus,
        peers=peers,
        nccl=nccl,
        triton=importlib.metadata.version("triton") if find_spec("triton") else None,
        compiler=next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None),
    )


def driver_version() -> int | None:
    """The newest CUDA version that the NVIDIA driver supports, as 1000 major + 10 minor; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    return number.value if library.cuDriverGetVersion(ctypes.byref(number)) == 0 else None


def _kernel_module() -> str:
    """The release of the NVIDIA kernel module, such as 550.54.15; empty without one."""
    words = KERNEL_MODULE.read_text().split() if KERNEL_MODULE.exists() else []
    return next((word for word in words if word.replace(".", "").isdecimal() and "." in word), "")


if __name__ == "__main__":
    print(json.dumps(asdict(probe())))
