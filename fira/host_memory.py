"""Memory that this process can allocate: on its machine, in its control groups (containers, Slurm jobs), by ulimit."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
FILES = (  # limit, use, and the keys of memory.stat that count pages of files, for versions 2 and 1 of control groups
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def available_memory(groups: Sequence[Path] | None = None, meminfo: Path = Path("/proc/meminfo")) -> float:
    """Bytes of memory that are available to this process and its children, without swap.

    Pages of files count as available, because the kernel frees them when it needs memory. On systems other than Linux
    this is the memory of the machine. groups: the control groups of this process; default: read from /proc/self/cgroup.
    """
    free = _numbers(meminfo).get("MemAvailable:")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is None else free * 1024
    available = min(float(machine), _address_space())
    for group in [own_group(), own_group("memory")] if groups is None else groups:
        for folder in (group, *group.parents):
            for limit_file, used_file, reclaimable in FILES:
                limit, used = read_text(folder / limit_file), read_text(folder / used_file)
                if limit.isdecimal() and used.isdecimal():
                    stat = _numbers(folder / "memory.stat")
                    available = min(
                        available, float(limit) - float(used) + sum(stat.get(key, 0) for key in reclaimable)
                    )
    return available


def _address_space() -> float:
    """Bytes that the limit of addresses (ulimit -v) leaves this process."""
    rows = [line.split() for line in read_text(Path("/proc/self/limits")).splitlines() if "address space" in line]
    if not rows or not rows[0][3].isdecimal():
        return math.inf
    return max(0.0, float(rows[0][3]) - _numbers(Path("/proc/self/status")).get("VmSize:", 0) * 1024)


def own_group(controller: str = "") -> Path:
    """The folder of this process's control group of version 2, or of a controller of version 1, or the root."""
    for line in read_text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return CGROUP / controller / path.lstrip("/")
    return CGROUP / controller


def read_text(path: Path) -> str:
    """The content of a file; empty if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _numbers(path: Path) -> dict[str, int]:
    """The lines `NAME NUMBER` of a file; empty if it cannot be read."""
    lines = (line.split() for line in read_text(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
