"""Simulated gain of overlapping the experts' all-to-all with their products, from the planner's device descriptions.

    python -m benchmarks.gpu.exchange    # prints the table; no GPU is needed

The experts of a rank form two halves, and an exchange of all rows becomes two exchanges of half the rows each:

    in line      compute          experts               combine
                 link     dispatch       send back
    overlapped   compute      experts 0   experts 1        combine
                 link     d 0     d 1   back 0  back 1

A micro-batch is a list of operations that the host starts one after another. Compute stream and link each execute
their operations in order; "wait" makes the compute stream wait for an exchange. Assumptions, besides those in the
device descriptions:

- Starting a kernel takes the host LAUNCH seconds. The host reads the sizes of the exchange once per layer and forward.
- An exchange between R ranks takes PEER seconds per peer in addition to the latency of the link.
- A product on SMS multiprocessors takes whole waves of tiles of TILE elements, so that half a product may take longer
  than half the time. Half of the experts have half of the tiles, because the rows of an expert are not split.
- While an exchange runs, kernels are slower by the share SLOWDOWN, because it occupies multiprocessors and memory.
- Between machines, an exchange uses the network for the peers on other machines and the links inside for the others.
- The halves' rows, outputs and weight gradients are joined by copies.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch

from fira.models.registry import PRESETS, build
from fira.nn.moe.experts import ExpertBank, GatedExperts, LinearExperts
from fira.planner.device_specs import Hardware, load
from fira.planner.model_profile import ModelProfile, layer_memory, profile_of

LAUNCH = 10e-6  # seconds of the host per kernel
PEER = 1e-6  # seconds per peer and exchange
SLOWDOWN = 0.1
SHORTEST = 3e-6  # seconds of a kernel on the device
TILE = 128 * 256
SMS = {"h100": 132, "h200": 132, "a100": 108, "t4": 40}
GROUPED = ("h100", "h200")  # one kernel for the products of all experts; otherwise one per expert
# Kernels of a block with the fused ones, forward and backward, without dispatch, experts and combine
KERNELS = {"fira": (42, 74), "rish": (70, 140), "blues": (85, 165), "microrwkv": (240, 400)}
DEVICES = ("h100", "h200", "a100", "t4")
FAMILIES = ("fira", "rish", "blues", "microrwkv")


class Operation(NamedTuple):
    """kind: "compute", "link", "wait" (for the exchange number `exchange`) or "read" (the host waits for all)."""

    kind: str
    seconds: float = 0.0
    kernels: int = 1
    exchange: int = -1


def duration(operations: list[Operation]) -> float:
    """Seconds until compute stream, link and host have finished all operations."""
    timeline, host = _Timeline(), 0.0
    ends: list[float] = []  # of exchanges
    for operation in operations:
        kind, seconds, kernels, exchange = operation
        if kind == "read":
            host = max(host, timeline.compute, timeline.link)
        elif kind == "wait":
            timeline.compute = max(timeline.compute, ends[exchange])
        elif kind == "link":
            host += 2 * LAUNCH  # a collective takes more of the host's time than a kernel
            ends.append(timeline.exchange(max(host, timeline.compute), seconds))
        else:
            first, host = host + LAUNCH, host + kernels * LAUNCH
            timeline.run(first, max(seconds, kernels * SHORTEST), host + seconds / kernels)
    return max(host, timeline.compute, timeline.link)


class _Timeline:
    """Compute stream and link. Operations are added in the order of the host."""

    def __init__(self) -> None:
        self.compute = self.link = 0.0  # ends of the last operations
        self.busy: list[tuple[float, float]] = []  # times at which the link is busy

    def exchange(self, ready: float, seconds: float) -> float:
        start = max(ready, self.link)
        self.link = start + seconds
        self.busy.append((start, self.link))
        return self.link

    def run(self, ready: float, seconds: float, least_end: float) -> None:
        """Run kernels whose last one cannot end before `least_end`, more slowly while the link is busy."""
        time = max(ready, self.compute)
        self.busy = [span for span in self.busy if span[1] > time]
        for start, end in self.busy:
            if seconds <= max(start - time, 0.0):
                break
            seconds -= max(start - time, 0.0)
            time = max(start, time)
            work = (end - time) * (1 - SLOWDOWN)
            if seconds <= work:
                time, seconds = time + seconds / (1 - SLOWDOWN), 0.0
                break
            time, seconds = end, seconds - work
        self.compute = max(time + seconds, least_end)


@dataclass(frozen=True)
class Case:
    """A model of a family with at least two experts per rank, of which each rank has `tokens` per micro-batch."""

    family: str
    device: str
    ep: int
    tokens: int

    @property
    def config(self) -> Any:
        preset = PRESETS[f"{self.family}-base"]
        multiple = math.ceil(preset.num_experts / self.ep) * self.ep
        return replace(preset, num_experts=max(multiple, 2 * self.ep))

    @property
    def precision(self) -> str:
        return "fp16" if self.device == "t4" else "bf16"


@dataclass(frozen=True)
class Layer:
    """Seconds of the parts of one layer, forward and backward."""

    case: Case
    hardware: Hardware
    top_k: int
    bank: ExpertBank  # all experts, on the meta device
    rest: tuple[float, float]

    @property
    def rows(self) -> int:
        return self.case.tokens * self.top_k

    def copy(self, width: int, share: float) -> float:
        """Read and write a share of the rows in 16 bits."""
        return 4 * share * self.rows * width / self.hardware.memory_bandwidth

    def exchange(self, row_bytes: int, share: float) -> float:
        ep, hardware = self.case.ep, self.hardware
        size = share * self.rows * row_bytes / ep  # to each peer
        near = min(ep, hardware.ranks_per_node)
        seconds = hardware.inside["all_to_all"].seconds((near - 1) * size)
        if ep > near:
            seconds = max(seconds, hardware.between["all_to_all"].seconds((ep - near) * size))
        return seconds + (ep - 1) * PEER

    def experts(self, parts: int, passes: int) -> float:
        """Products and elementwise kernels of 1 / parts of this rank's experts. passes: 1 forward, 2 backward."""
        count = self.case.config.num_experts // self.case.ep
        experts = math.ceil(count / parts)
        rows, sms = self.rows / count, SMS[self.case.device]
        rate = self.hardware.flops[self.case.precision]
        seconds = 0.0
        weights = [p for p in self.bank.parameters() if p.dim() == 3]
        for _, out, inner in (p.shape for p in weights):
            kernels, grouped = (1, experts) if self.case.device in GROUPED else (experts, 1)
            tiles = grouped * math.ceil(rows / 128) * math.ceil(out / 256)
            seconds += passes * kernels * math.ceil(tiles / sms) * sms * 2 * TILE * inner / rate
        hidden = 0 if isinstance(self.bank, LinearExperts) else weights[1].shape[2]
        factor = 3 if isinstance(self.bank, GatedExperts) else 2
        return seconds + passes * factor * 2 * experts * rows * hidden / self.hardware.memory_bandwidth

    def kernels(self, parts: int, passes: int) -> int:
        count = self.case.config.num_experts // self.case.ep
        products = 1 if self.case.device in GROUPED else math.ceil(count / parts)
        matrices = sum(p.dim() == 3 for p in self.bank.parameters())
        return passes * matrices * products + 3 * passes


@cache
def block_of(family: str) -> tuple[ExpertBank, ModelProfile, float, float]:
    """Experts of a block of <family>-base, the model's profile, and bytes saved for the backward: a + b · sequences."""
    with torch.device("meta"):
        profile = profile_of(build(PRESETS[f"{family}-base"]))
    kind = profile.layers[1]
    inputs = 4 * profile.tokens * profile.width
    one, two = ((layer_memory(profile, kind, count, torch.bfloat16).saved + count * inputs) / 2 for count in (1, 2))
    block = profile.kinds[kind].layer
    return next(m for m in block.modules() if isinstance(m, ExpertBank)), profile, 2 * one - two, two - one


def layer_of(case: Case, hardware: Hardware) -> Layer:
    """The rest of a block is the planner's estimate for the block less the experts, and at least its products."""
    bank, profile, constant, per_sequence = block_of(case.family)
    kind = profile.kinds[profile.layers[1]]
    rate = hardware.flops[case.precision]
    layer = Layer(case, hardware, int(kind.top_k), bank, (0.0, 0.0))
    flops = profile.flops[1] * case.tokens
    other = flops - 2 * layer.top_k * bank.own_numel() * case.tokens
    saved = constant + per_sequence * case.tokens / profile.tokens
    forward = max(flops / rate, 2 * saved / hardware.memory_bandwidth)
    backward = max(2 * flops / rate, 3 * saved / hardware.memory_bandwidth)
    rest = (
        max(forward - layer.experts(1, 1), other / rate),
        max(backward - layer.experts(1, 2), 2 * other / rate),
    )
    return replace(layer, rest=rest)


def forward(layer: Layer, parts: int, exchanges: Iterator[int]) -> list[Operation]:
    """One layer. parts: 1 in line, 2 overlapped."""
    d, h, share = layer.case.config.d_model, _width(layer), 1 / parts
    rest, _ = KERNELS[layer.case.family]
    counts = next(exchanges)
    result = [Operation("compute", layer.rest[0], rest), Operation("link", layer.exchange(0, 1))]
    result += [Operation("wait", exchange=counts), Operation("compute", 5e-6, 22 if parts > 1 else 8)]
    result += [Operation("read"), Operation("compute", layer.copy(d, 1), 2)]
    keys, rows, back = [], [], []
    for _ in range(parts):
        if hasattr(layer.case.config, "dropout"):
            keys.append(next(exchanges))
            result.append(Operation("link", layer.exchange(4, share)))
        rows.append(next(exchanges))
        result.append(Operation("link", layer.exchange(2 * d, share)))
    for part in range(parts):
        waits = [*keys[part : part + 1], rows[part]]
        result += [Operation("wait", exchange=number) for number in waits]
        result.append(Operation("compute", layer.copy(d, share), len(waits)))
        result.append(Operation("compute", layer.experts(parts, 1), layer.kernels(parts, 1)))
        result.append(Operation("compute", layer.copy(h, share)))
        back.append(next(exchanges))
        result.append(Operation("link", layer.exchange(2 * h, share)))
    result += [Operation("wait", exchange=number) for number in back]
    if parts > 1:
        result.append(Operation("compute", layer.copy(h, 1)))
    return [*result, Operation("compute", layer.copy(h, 1), 2)]


def backward(layer: Layer, parts: int, exchanges: Iterator[int]) -> list[Operation]:
    """The gradients of `forward`, in reverse order."""
    d, h, share = layer.case.config.d_model, _width(layer), 1 / parts
    result = [Operation("compute", layer.copy(h, 1), 3)]
    back, rows = [], []
    for _ in range(parts):
        back.append(next(exchanges))
        result.append(Operation("link", layer.exchange(2 * h, share)))
    for part in range(parts):
        result.append(Operation("wait", exchange=back[part]))
        result.append(Operation("compute", layer.copy(h, share)))
        result.append(Operation("compute", layer.experts(parts, 2), layer.kernels(parts, 2)))
        result.append(Operation("compute", layer.copy(d, share)))
        rows.append(next(exchanges))
        result.append(Operation("link", layer.exchange(2 * d, share)))
    result += [Operation("wait", exchange=number) for number in rows]
    if parts > 1:
        experts = layer.case.config.num_experts // layer.case.ep
        traffic = 8 * experts * layer.bank.own_numel()  # zeros of the other half, and a sum
        result.append(Operation("compute", traffic / layer.hardware.memory_bandwidth, 4))
        result.append(Operation("compute", layer.copy(d, 1)))
    result.append(Operation("compute", layer.copy(d, 1), 2))
    return [*result, Operation("compute", layer.rest[1], KERNELS[layer.case.family][1])]


def _width(layer: Layer) -> int:
    """Width of an expert's output."""
    return [p for p in layer.bank.parameters() if p.dim() == 3][-1].shape[1]


def simulate(case: Case, parts: int) -> tuple[float, float]:
    """Seconds of one layer and of one micro-batch through the model."""
    hardware = load(case.device)
    layer = layer_of(case, hardware)
    head = 6 * case.config.d_model * case.config.vocab_size * case.tokens / hardware.flops[case.precision]

    def total(layers: int) -> float:
        exchanges = iter(range(10**6))
        operations = [op for _ in range(layers) for op in forward(layer, parts, exchanges)]
        operations.append(Operation("compute", head, 20))
        operations += [op for _ in range(layers) for op in backward(layer, parts, exchanges)]
        return duration(operations)

    return (total(20) - total(10)) / 10, total(case.config.num_layers)


def main() -> None:
    """Print the time of a layer in line, and the gain per layer and per micro-batch, of every case."""
    cases = [(ep, tokens) for ep in (2, 8, 16, 64) for tokens in (4096, 16384)]
    print("| device | model |", *(f"ep {ep}, {tokens // 1024}k |" for ep, tokens in cases))
    print("|---" * (2 + len(cases)) + "|")
    for device in DEVICES:
        for family in FAMILIES:
            cells = []
            for ep, tokens in cases:
                case = Case(family, device, ep, tokens)
                (layer, step), overlapped = simulate(case, 1), simulate(case, 2)
                gains = (100 * (1 - after / before) for after, before in zip(overlapped, (layer, step), strict=True))
                cells.append(f"{1e3 * layer:.3g} ms: " + " / ".join(f"{gain:+.0f}" for gain in gains))
            print("|", " | ".join([device, family, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
