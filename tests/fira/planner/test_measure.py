"""Memory of the devices of this machine."""

import pytest
import torch

from fira.planner.measure import device_memory


@pytest.mark.parametrize(("ranks", "available"), [(1, 9e9), (2, 9e9), (4, 4.5e9)])
def test_memory_of_a_gpu_is_what_is_free_or_reserved_by_this_process(monkeypatch, ranks, available):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8e9, 16e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1e9)
    assert device_memory(torch.device("cuda", 0), ranks) == available
