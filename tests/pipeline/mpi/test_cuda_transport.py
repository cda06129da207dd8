"""Choice of the transport for CUDA tensors on simulated GPUs, and the end of NCCL's groups."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.mpi import cuda_transport
from tests.launch import run_function, run_ranks


def refuse(*args: object) -> Any:
    raise AssertionError("CUDA was initialised")


def choose(devices: int, visible: list[str] | None = None, cuda: bool = True) -> list[Any]:
    """The transport on a machine with this number of GPUs, and the mode in which CUDA will load kernels.

    visible: CUDA_VISIBLE_DEVICES of each rank.
    """
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[dist.get_rank()]
    dist.is_nccl_available = lambda: True
    torch.cuda.device_count = (lambda: devices) if cuda else refuse
    torch.cuda._lazy_init = torch.cuda.set_device = torch.cuda.get_device_properties = refuse
    return [*cuda_transport.choose_transport(dist.get_rank(), cuda), os.environ.get("CUDA_MODULE_LOADING")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"devices": 2}, ["nccl", False, "EAGER"]),
        ({"devices": 1}, ["mpi", False, "EAGER"]),
        pytest.param({"devices": 0}, [None, False, "EAGER"], marks=pytest.mark.slow),
        pytest.param({"devices": 1, "visible": ["0", "1"]}, ["nccl", False, "EAGER"], marks=pytest.mark.slow),
        pytest.param({"devices": 1, "visible": ["1", "1"]}, ["mpi", False, "EAGER"], marks=pytest.mark.slow),
        ({"devices": 2, "visible": ["0,1", "1,0"]}, ["mpi", False, "EAGER"]),
        pytest.param({"devices": 2, "cuda": False}, [None, False, None], marks=pytest.mark.slow),
    ],
)
def test_transport_is_chosen_without_initialising_cuda(arguments: dict[str, Any], expected: list[Any]) -> None:
    assert run_function(2, __name__, "choose", **arguments) == [expected] * 2


def test_device_is_set_before_the_test_message(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cuda_transport, "_claims_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append("set_device"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    full = torch.full
    monkeypatch.setattr(
        torch, "full", lambda size, value, dtype, device: calls.append("full") or full(size, value, dtype=dtype)
    )
    assert cuda_transport.is_cuda_aware([torch.device("cuda", 1)])
    assert calls == ["set_device", "full", "synchronize"]


EXIT = """
import sys
import torch
import torch.distributed as dist
import pipeline
from pipeline.mpi import store

def record(event):
    with open(sys.argv[1], "a") as file:
        file.write(event + "\\n")

def close(self, close=store.MPIStore._close):
    record("close store")
    close(self)

def destroy(group, destroy=dist.destroy_process_group):
    record("destroy " + dist.get_process_group_ranks(group).__repr__())
    destroy(group)

store.MPIStore._close = close
rank = pipeline.init().rank
gloo, mpi = dist.new_group(backend="gloo"), dist.new_group([rank], use_local_synchronization=True)
dist.all_reduce(torch.ones(1), group=gloo)
dist.destroy_process_group = destroy
config = dist.get_backend_config
dist.get_backend_config = lambda group: config(group).replace("gloo", "nccl")
"""


def test_nccl_groups_are_destroyed_on_all_ranks_before_the_store_is_closed(tmp_path: Path) -> None:
    """A group of gloo stands for one of NCCL. Groups of MPI are left alone."""
    (tmp_path / "exit.py").write_text(EXIT)
    result = run_ranks(2, tmp_path / "exit.py", tmp_path / "events")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "events").read_text().splitlines() == ["destroy [0, 1]"] * 2 + ["close store"]
