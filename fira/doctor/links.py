"""Latency and bandwidth between pairs of ranks, measured as in training: through the backend, from device to device."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist

from fira.progress_bar import progress_bar
from pipeline.mesh import Layout, make_mesh
from pipeline.mpi import World

LATENCY_BYTES, BANDWIDTH_BYTES = 8, 2**22  # sizes of the messages that measure the two
PAIR_SECONDS = 0.2  # for each size of message; a slow link takes at least two round trips
ROUND_TRIPS = 50  # at most
ALL_PAIRS = 8  # ranks up to which all pairs are measured, one after another; above, neighbours only
SHOWN = 8  # rows of the table above ALL_PAIRS ranks


@dataclass(frozen=True)
class PairLink:
    """The connection between two ranks. latency: seconds of a small message. bandwidth: bytes/s of a large one."""

    ranks: tuple[int, int]
    latency: float
    bandwidth: float


def measure_links(world: World, device: torch.device) -> tuple[list[PairLink], str]:
    """Measure the links between ranks, and return them with the name of the backend (collective)."""
    group = make_mesh(Layout(1, world.size, 1), (0,), [device]).groups["dp"]
    rounds = pairs_of(world.size)
    own = []
    with progress_bar(len(rounds), "measuring links", shown=world.rank == 0, unit=" rounds") as bar:
        for pairs in rounds:
            dist.barrier()
            for pair in pairs:
                if world.rank == pair[0]:
                    small, large = (_ping(pair[1], size, device, group) for size in (LATENCY_BYTES, BANDWIDTH_BYTES))
                    own.append(PairLink(pair, small / 2, 2 * BANDWIDTH_BYTES / large))
                elif world.rank == pair[1]:
                    for size in (LATENCY_BYTES, BANDWIDTH_BYTES):
                        _pong(pair[0], size, device, group)
            bar.update(1)
    links: list[Any] = [None] * world.size
    dist.all_gather_object(links, own)
    backend = dist.get_backend(group).split(":")[-1]
    return sorted((link for part in links for link in part), key=lambda link: link.ranks), backend


def pairs_of(size: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of ranks. The pairs of a round have no rank in common and are measured at the same time."""
    if size <= ALL_PAIRS:
        return [[pair] for pair in combinations(range(size), 2)]
    neighbours = [(rank, rank + 1) for rank in range(size - 1)]
    return [neighbours[::2], neighbours[1::2]]


def _ping(peer: int, size: int, device: torch.device, group: dist.ProcessGroup) -> float:
    """Median seconds of a message of `size` bytes to a peer and back. Its first element is 0 in the last one."""
    message = torch.ones(size // 4, device=device)
    times: list[float] = []
    begin = time.perf_counter()
    while float(message[0]):
        if len(times) == ROUND_TRIPS or (times and time.perf_counter() - begin > PAIR_SECONDS):
            message[0] = 0.0
        started = time.perf_counter()
        dist.send(message, peer, group=group)
        dist.recv(message, peer, group=group)
        if message.is_cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first message connects the ranks


def _pong(peer: int, size: int, device: torch.device, group: dist.ProcessGroup) -> None:
    """Return the messages of `_ping`."""
    message = torch.ones(size // 4, device=device)
    while float(message[0]):
        dist.recv(message, peer, group=group)
        dist.send(message, peer, group=group)


def describe_links(links: Sequence[PairLink], size: int, device: torch.device, backend: str) -> str:
    """The links as a table; above `ALL_PAIRS` ranks the slowest ones."""
    shown = list(links)
    title = f"links between ranks: {device.type} tensors over {backend}"
    if size > ALL_PAIRS:
        shown = sorted(links, key=lambda link: link.bandwidth)[:SHOWN]
        median = statistics.median(link.bandwidth for link in links)
        title += f"; the {len(shown)} slowest of {len(links)} neighbours, median {median / 1e9:.2f} GB/s"
    rows = [
        f"  {link.ranks[0]:>4} – {link.ranks[1]:<4}{link.latency * 1e6:>10.0f} µs{link.bandwidth / 1e9:>10.2f} GB/s"
        for link in shown
    ]
    return "\n".join([title, f"  {'ranks':<11}{'latency':>13}{'bandwidth':>15}", *rows])
