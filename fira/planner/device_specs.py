"""Device descriptions: memory, FLOP/s and links, read from TOML files such as those in `devices/`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fira.errors import UserError
from fira.files import read_toml
from fira.value_types import NotNegative, Positive, Size, check

DEVICES = Path(__file__).parent / "devices"
OPERATIONS = ("p2p", "all_to_all", "all_reduce")


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes latency + n / bandwidth seconds; for a ring all-reduce, n is what each rank sends."""

    latency: float
    bandwidth: float  # bytes/s in each direction

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth


Links = Mapping[str, Link]  # by operation


@dataclass(frozen=True)
class Hardware:
    """One rank's device and the links between ranks. FLOP/s and bandwidths are achieved values, not rated ones.

    overlaps_collectives: whether gradients are reduced during the backward, and the experts' all-to-all between nodes
    overlaps with their products, as with NCCL. On a CPU neither does.
    """

    name: str
    memory: float  # bytes
    memory_bandwidth: float  # bytes/s
    flops: Mapping[str, float]  # FLOP/s by precision
    seconds_per_layer: float
    ranks_per_node: int
    inside: Links  # between ranks of a node
    between: Links  # between nodes
    overlaps_collectives: bool
    cores: float = 1.0  # of each rank, if all compute; less than 1 where ranks share the cores of a CPU

    def fastest_precision(self) -> str:
        """The first of bf16, fp16 and fp32 with the highest FLOP/s, which is what `--precision auto` selects."""
        return max(("bf16", "fp16", "fp32"), key=lambda precision: self.flops.get(precision, 0.0))

    def links(self, ranks: int, stride: int) -> Links:
        """The slowest links within a group of ranks whose numbers are `stride` apart."""
        return self.inside if (ranks - 1) * stride < self.ranks_per_node else self.between


def load(name: str, flag: str = "--device") -> Hardware:
    """Load a shipped description by name, or a TOML file by path.

    Raises UserError if there is no such description, or if it is incomplete.
    """
    path = DEVICES / f"{name}.toml"
    if not path.exists():
        path = Path(name)
        if path.suffix != ".toml" or not path.exists():
            known = ", ".join(sorted(file.stem for file in DEVICES.glob("*.toml")))
            first = "this, " if flag == "--device" else ""
            raise UserError(f"{flag} {name}: no such device; choose {first}{known}, or give a TOML file")
    values = read_toml(path, f"{flag} {name}")
    try:
        efficiency = float(values["efficiency"])
        hardware = Hardware(
            name=str(values["name"]),
            memory=values["memory"],
            memory_bandwidth=efficiency * values["memory_bandwidth"],
            flops={precision: efficiency * value for precision, value in values["flops"].items()},
            seconds_per_layer=values["seconds_per_layer"],
            ranks_per_node=values["ranks_per_node"],
            inside=_links(values["inside"]),
            between=_links(values["between"]),
            overlaps_collectives=True,  # descriptions are of GPUs
        )
    except KeyError as error:
        example = DEVICES / "h200.toml"
        raise UserError(
            f"{flag} {name}: the file has no value for {error.args[0]}; {example} is a complete example"
        ) from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{flag} {name}: a value has the wrong type: {error}") from None
    _check(hardware, f"{flag} {name}:")
    return hardware


def _check(hardware: Hardware, where: str) -> None:
    """Raise UserError if a number of a description is out of range."""
    check(f"{where} memory", hardware.memory, Positive)
    check(f"{where} memory_bandwidth times efficiency", hardware.memory_bandwidth, Positive)
    check(f"{where} seconds_per_layer", hardware.seconds_per_layer, NotNegative)
    check(f"{where} ranks_per_node", hardware.ranks_per_node, Size)
    for precision, flops in hardware.flops.items():
        check(f"{where} {precision} in flops times efficiency", flops, Positive)
    for links in (hardware.inside, hardware.between):
        for link in links.values():
            check(f"{where} latency", link.latency, NotNegative)
            check(f"{where} bandwidth", link.bandwidth, Positive)


def _links(table: Mapping[str, Any]) -> Links:
    """One link for all operations; an operation with a table of its own overrides it."""
    return {name: _link(table.get(name, table)) for name in OPERATIONS}


def _link(table: Mapping[str, Any]) -> Link:
    return Link(float(table["latency"]), float(table["bandwidth"]))
