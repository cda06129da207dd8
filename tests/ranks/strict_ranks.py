"""Training of `parity_ranks` with ordinary and with strict process groups, and with the designs that NCCL deadlocks."""

import dataclasses
from typing import Any

import pipeline.mesh
from pipeline.mesh import Layout, Mesh, make_mesh
from tests.ranks import parity_ranks, strict_group


def train_both(cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The results of all cases with the ordinary backend, as on a CPU, and those with strict groups, as with NCCL."""
    ordinary = parity_ranks.train_all([case | {"reduction": "plain"} for case in cases])
    strict_group.install()
    return [ordinary, parity_ranks.train_all(cases)]


def train_unconnected() -> None:
    """Train with communicators that are created when they are first used."""
    strict_group.install()
    pipeline.mesh._connect = lambda mesh, devices: None
    parity_ranks.train([2, 1, 1], steps=1)


def train_on_one_communicator() -> None:
    """Train with one process group for the messages of both directions between two ranks."""
    strict_group.install()

    def make_mesh_with_shared_group(layout: Layout, *arguments: Any) -> Mesh:
        mesh = make_mesh(layout, *arguments)
        return dataclasses.replace(mesh, channels=dict.fromkeys(mesh.channels, mesh.groups["pp"]))

    parity_ranks.make_mesh = make_mesh_with_shared_group
    parity_ranks.train([2, 1, 1], steps=1)
