"""Installed packages, and the cores, memory and disk that this process may use."""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fira.doctor.finding import Finding, Level
from fira.host_memory import own_group, read_text
from pipeline.mpi.cores import own_cores

GB = 1e9
MEMORY_PER_RANK = 1.0 * GB  # of fira-tiny, with the libraries
DISK = 5 * GB  # two checkpoints of fira-tiny and the prepared data need less, one of fira-base about 4 GB
SHARED_MEMORY = 0.2 * GB  # NCCL fails with the 64 MB of a container's default
PACKAGES = (
    *("torch", "torchgpipe", "mpi4py", "safetensors", "tokenizers", "jinja2"),
    *("numpy", "pandas", "matplotlib", "pyarrow", "tqdm"),
)


def packages_finding(missing: Sequence[str]) -> Finding:
    if not missing:
        return Finding("packages", f"all {len(PACKAGES)} are installed")
    return Finding("packages", f"missing: {', '.join(missing)}", Level.FATAL, f"pip install {' '.join(missing)}")


def missing_packages() -> list[str]:
    """The packages that training needs and that this Python does not find."""
    return [name for name in PACKAGES if find_spec(name) is None]


@dataclass(frozen=True)
class Cores:
    """machine: cores of the machine; allowed: by this process's affinity; quota: by its control group, or None."""

    machine: int
    allowed: int
    quota: float | None


def read_cores(group: Path | None = None) -> Cores:
    """The cores of this process. group: its control group; default: read from /proc/self/cgroup."""
    return Cores(os.cpu_count() or 1, len(own_cores()), _quota(group or own_group()))


def cores_finding(cores: Cores) -> Finding:
    text = f"{cores.allowed} of {cores.machine}" if cores.allowed < cores.machine else f"{cores.machine}"
    if cores.quota is None or cores.quota >= cores.allowed:
        return Finding("cores", f"{text}; more ranks than this share them")
    text += f", limited to the time of {cores.quota:g} by a control group"
    last = max(1, math.floor(cores.quota)) - 1
    remedy = f"threads follow the affinity, not this limit: start with taskset -c 0-{last} mpirun …"
    return Finding("cores", text, Level.PROBLEM, remedy)


def _quota(group: Path) -> float | None:
    """Cores' worth of time that a control group or one of its parents allows; None: no limit."""
    limits = []
    for folder in (group, *group.parents):
        words = read_text(folder / "cpu.max").split() or [
            read_text(folder / "cpu" / "cpu.cfs_quota_us"),  # version 1
            read_text(folder / "cpu" / "cpu.cfs_period_us"),
        ]
        if words[0].isdecimal() and words[1].isdecimal():
            limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


def memory_finding(free: float, ranks: int) -> Finding:
    """ranks: the number of ranks on this machine; 1 without mpirun."""
    text, needed = f"{free / GB:.1f} GB available", ranks * MEMORY_PER_RANK
    if free >= needed:
        return Finding("memory", text)
    text += f", {ranks} {'rank needs' if ranks == 1 else 'ranks need'} about {needed / GB:.0f} GB"
    return Finding("memory", text, Level.PROBLEM, "end other programs, start fewer ranks, or train a smaller model")


def shared_memory_finding(total: float, gpus: int) -> Finding:
    """total: size of /dev/shm in bytes."""
    text = f"{total / GB:.2f} GB in /dev/shm"
    if total >= SHARED_MEMORY or gpus < 2:
        return Finding("shared memory", text)
    remedy = "start the container with --shm-size=1g"
    return Finding("shared memory", f"{text}, too little for NCCL", Level.PROBLEM, remedy)


def folder_finding(subject: str, folder: Path, flag: str) -> Finding:
    """Whether a folder, or the nearest parent that exists, has space and is writable. flag: chooses another folder."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return Finding(subject, f"{folder} is not writable", Level.FATAL, f"choose another folder with {flag}")
    free = shutil.disk_usage(existing).free
    text = f"{free / GB:.1f} GB free in {folder}"
    if free >= DISK:
        return Finding(subject, text)
    remedy = f"free {DISK / GB:.0f} GB, or choose a folder on another disk with {flag}"
    return Finding(subject, text, Level.PROBLEM, remedy)
