"""Memory of the devices of this machine, time of Muon's matrices, and cached measurements."""

import pytest
import torch

from fira.planner import measure_optimizer
from fira.planner.measure import device_memory
from fira.planner.measurement_cache import cached
from pipeline.mpi import World


@pytest.mark.parametrize(("ranks", "available"), [(1, 9e9), (2, 9e9), (4, 4.5e9)])
def test_memory_of_a_gpu_is_what_is_free_or_reserved_by_this_process(monkeypatch, ranks, available):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8e9, 16e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1e9)
    assert device_memory(torch.device("cuda", 0), ranks) == available


def test_each_shape_of_a_matrix_is_measured_once(monkeypatch, tiny, muon):
    """A block of fira-tiny has four matrices of attention, and two shapes of matrices of each of four experts."""
    calls = []

    def median_seconds(work, *arguments) -> float:
        calls.append(work())
        return 10.0 ** len(calls)

    monkeypatch.setattr(measure_optimizer, "median_seconds", median_seconds)

    def seconds(profile, kind: int) -> float:
        device = torch.device("cpu")
        return measure_optimizer.measure_orthogonalization(profile.kinds[kind], torch.float32, None, device)

    assert seconds(tiny, 1) == seconds(muon, 0) == seconds(muon, 2) == 0
    assert not calls
    assert seconds(muon, 1) == pytest.approx((4 * 10 + 4 * 100 + 4 * 1000) / torch.get_num_threads())
    assert all(len(matrices) == torch.get_num_threads() for matrices in calls)  # a thread computes a matrix by itself
    assert {(*matrix.shape,) for matrices in calls for matrix in matrices} == {(128, 128), (256, 128), (128, 256)}


@pytest.mark.parametrize("damaged", ["", "{}", "[[1]]"])
def test_damaged_measurement_is_repeated(monkeypatch, tmp_path, damaged):
    """A machine that loses power may leave an empty file, and another version a different form."""
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda *_, **__: None)
    world = World(0, 1, 0, 1)
    assert cached(["key"], lambda: 1, int, world) == 1
    assert cached(["key"], lambda: 2, int, world) == 1
    (file,) = (tmp_path / "planner").iterdir()
    file.write_text(damaged)
    assert cached(["key"], lambda: 3, int, world) == 3
    assert cached(["key"], lambda: 4, int, world) == 3


def test_a_stored_result_that_is_not_valid_is_repeated_and_a_new_one_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda *_, **__: None)
    world = World(0, 1, 0, 1)
    assert cached(["key"], lambda: 1, int, world, lambda found: False) == 1
    assert cached(["key"], lambda: 2, int, world, lambda found: found == 1) == 1
    assert cached(["key"], lambda: 3, int, world, lambda found: found == 2) == 3


def test_a_measurement_that_cannot_be_stored_is_used(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda *_, **__: None)
    (tmp_path / "planner").write_text("")
    assert cached(["key"], lambda: 1, int, World(0, 1, 0, 1)) == 1
    assert "cannot be stored" in caplog.text
