"""The hosts on which ranks can run now, and the number of ranks on each."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from fira.doctor.limited_process import run_limited
from fira.errors import UserError

LIMIT_S = 30.0  # for the program of --hosts
LINE = re.compile(r"(?P<host>[\w.-]+|\[[\w:]+\])(?::(?P<mpich>\d+)|\s+slots\s*=\s*(?P<open_mpi>\d+))?(?:\s.*)?")

Slots = dict[str, int]  # number of slots by host, in the order in which hosts are filled


def read_hosts(path: str) -> Slots:
    """Read a host file of MPICH (`node1:4`) or Open MPI (`node1 slots=4`), or run a program that prints one.

    A host without a number has one slot. Raises UserError if there is no such file, if the program fails, or for a
    line that is not a host.
    """
    text = _run(path) if os.access(path, os.X_OK) and Path(path).is_file() else _read(path)
    slots: Slots = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        found = LINE.fullmatch(line)
        if not found:
            raise UserError(f"--hosts {path}: {line!r} is not a host; give lines such as node1:4 or node1 slots=4")
        slots[found["host"]] = slots.get(found["host"], 0) + int(found["mpich"] or found["open_mpi"] or 1)
    return slots


def _read(path: str) -> str:
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"--hosts {path}: not a regular file; give a host file, or a program that prints one")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise UserError(f"--hosts {path}: {reason}; give a host file, or a program that prints one") from None


def _run(path: str) -> str:
    outcome = run_limited([path], LIMIT_S, dict(os.environ))
    if outcome.status != 0:
        raise UserError(f"--hosts {path}: ended with status {outcome.status}: {outcome.last_lines(1) or 'no output'}")
    return outcome.output


def place(slots: Mapping[str, int], ranks: int) -> Slots:
    """The number of ranks on each host when hosts are filled in order. The slots must be sufficient."""
    placement: Slots = {}
    for host, number in slots.items():
        if taken := min(number, ranks - sum(placement.values())):
            placement[host] = taken
    return placement


def lost(placement: Mapping[str, int], slots: Mapping[str, int]) -> list[str]:
    """The hosts of a placement that now have fewer slots than ranks, such as "node1 (2 of 4 slots)"."""
    left = {host: slots.get(host, 0) for host in placement}
    return [
        f"{host} ({left[host]} of {n} slots)" if left[host] else host for host, n in placement.items() if left[host] < n
    ]
