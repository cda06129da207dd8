"""The axes of the mesh."""

import pytest
import torch
import torch.distributed as dist

import pipeline.mesh
from pipeline.mesh import Layout, Mesh, make_mesh
from pipeline.mpi import cuda_transport


def test_groups_of_every_axis():
    """The example of pipeline/mesh.py: pp 2, dp 4, ep 2."""
    layout = Layout(2, 4, 2)

    def groups(axis: str) -> list[list[int]]:
        by_rank = [layout.group(axis, rank) for rank in range(8)]
        assert all(rank in group for rank, group in enumerate(by_rank))
        return [list(group) for group in sorted(set(map(tuple, by_rank)))]

    assert layout.world == 8
    assert str(layout) == "pp 2 × dp 4 (ep 2)"
    assert groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups("dp") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups("ep") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups("edp") == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_coordinates_of_every_rank():
    layout = Layout(2, 4, 2)
    meshes = [Mesh(layout, rank, {}, [], {}) for rank in range(8)]
    assert [(m.pp_rank, m.dp_rank, m.edp_rank, m.ep_rank) for m in meshes] == [
        (pp, 2 * edp + ep, edp, ep) for pp in range(2) for edp in range(2) for ep in range(2)
    ]


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 3, 2)])
def test_invalid_layout_raises(sizes):
    with pytest.raises(ValueError, match="each must be at least 1, and ep must divide dp"):
        Layout(*sizes)


@pytest.mark.parametrize("rank", range(4))
def test_whether_gpus_of_several_machines_share_experts(monkeypatch, rank):
    """Ranks 0 and 1 are on one machine, 2 and 3 on another."""
    monkeypatch.setattr(cuda_transport, "cuda_backend", lambda devices: "nccl")
    monkeypatch.setattr(cuda_transport, "machines", lambda: ["a", "a", "b", "b"])
    monkeypatch.setattr(pipeline.mesh, "_connect", lambda mesh, devices: None)
    monkeypatch.setattr(dist, "new_group", lambda ranks, **_: ranks)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    meshes = {ep: make_mesh(Layout(1, 4, ep), [0], [torch.device("cuda")]) for ep in (1, 2, 4)}
    assert {ep: mesh.ep_between_machines for ep, mesh in meshes.items()} == {1: False, 2: False, 4: True}
    assert not make_mesh(Layout(1, 4, 4), [0]).ep_between_machines
