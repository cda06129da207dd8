"""Memory of the devices of this machine, and cached measurements."""

import pytest
import torch

from fira.planner.measure import device_memory
from fira.planner.measurement_cache import cached
from pipeline.mpi import World


@pytest.mark.parametrize(("ranks", "available"), [(1, 9e9), (2, 9e9), (4, 4.5e9)])
def test_memory_of_a_gpu_is_what_is_free_or_reserved_by_this_process(monkeypatch, ranks, available):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8e9, 16e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1e9)
    assert device_memory(torch.device("cuda", 0), ranks) == available


def test_damaged_measurement_is_repeated(monkeypatch, tmp_path):
    """A machine that loses power may leave an empty file."""
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda *_, **__: None)
    world = World(0, 1, 0, 1)
    assert cached(["key"], lambda: 1, world) == 1
    assert cached(["key"], lambda: 2, world) == 1
    (file,) = (tmp_path / "planner").iterdir()
    file.write_text("")
    assert cached(["key"], lambda: 3, world) == 3
    assert cached(["key"], lambda: 4, world) == 3
