"""Choice of devices and precision, and the peak FLOP/s, with simulated GPUs."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fira import devices
from fira.errors import UserError
from tests.launch import run_function

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def current(monkeypatch) -> list[torch.device]:
    """Four simulated GPUs. Contains the devices that became the current one."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(
    ("device", "local_rank", "expected"), [("auto", 0, "cuda:0"), ("cuda", 3, "cuda:3"), ("auto", 5, "cuda:1")]
)
def test_device_by_local_rank_is_the_current_one(current, device, local_rank, expected):
    chosen = devices.choose_devices(device, None, local_rank)
    assert ",".join(map(str, chosen)) == expected
    assert current == chosen


@pytest.mark.parametrize(("device", "local_devices"), [("cpu", None), ("auto", "cpu,cpu")])
def test_cpu_does_not_touch_cuda(monkeypatch, device, local_devices):
    def fail(*args):
        raise AssertionError("a CUDA function was called")

    for name in ("_lazy_init", "is_available", "device_count", "set_device"):
        monkeypatch.setattr(torch.cuda, name, fail)
    assert {d.type for d in devices.choose_devices(device, local_devices, 1)} == {"cpu"}


def choose_on_machines(cases: list[tuple[list[list[str]], str]]) -> list[list[str]]:
    return [choose_on_machine(*case) for case in cases]


def choose_on_machine(visible: list[list[str]], names: str) -> list[str]:
    """The physical devices that a rank uses and makes current, or its error. visible: of each rank, by index."""
    own = visible[dist.get_rank()]
    current: list[torch.device] = []
    torch.cuda.device_count = lambda: len(own)
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=own[index])
    torch.cuda.set_device = current.append
    try:
        chosen = devices.choose_devices("auto", names, dist.get_rank())
    except UserError as error:
        return [str(error)]
    assert current == chosen[:1]
    return [own[device.index] for device in chosen]


FOUR = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]
THREE = "cuda:0,cuda:1,cuda:2"
CANNOT = "--local-devices {}: the 2 ranks that see these devices cannot share {} equally; give a multiple of the"


# The devices that each rank sees, the names that are given, and the devices that each rank uses
MACHINES = [
    ([FOUR[:2]], "cuda:0,cuda:1", [["GPU-a", "GPU-b"]]),
    ([FOUR], "cuda:2,cuda:3", [["GPU-c", "GPU-d"]]),
    # all ranks see all devices, and divide them
    ([FOUR, FOUR], "cuda,cuda:1,cuda:2,cuda:3", [["GPU-a", "GPU-b"], ["GPU-c", "GPU-d"]]),
    ([FOUR[:2]] * 2, "cuda:0,cuda:1", [["GPU-a"], ["GPU-b"]]),
    # Slurm's --gpus-per-task: each rank has its own
    ([FOUR[:2], FOUR[2:]], "cuda:0,cuda:1", [["GPU-a", "GPU-b"], ["GPU-c", "GPU-d"]]),
    ([FOUR[:1], FOUR[1:2]], "cuda:0", [["GPU-a"], ["GPU-b"]]),
    # too few
    ([FOUR[:1]], "cuda:0,cuda:1", [["--local-devices cuda:0,cuda:1: torch sees 1 CUDA device"]]),
    ([[]], "cuda:0", [["--local-devices cuda:0: torch sees 0 CUDA devices"]]),
    ([FOUR[:1]] * 2, "cuda:0", [[CANNOT.format("cuda:0", 1) + " number of ranks"]] * 2),
    ([FOUR] * 2, THREE, [[CANNOT.format(THREE, 3) + " number of ranks"]] * 2),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_local_devices_of_ranks_that_see_the_same_or_their_own_devices(ranks):
    cases = [(visible, names) for visible, names, _ in MACHINES if len(visible) == ranks]
    expected = [used for visible, _, used in MACHINES if len(visible) == ranks]
    by_rank = run_function(ranks, __name__, "choose_on_machines", cases=cases)
    assert [list(used) for used in zip(*by_rank, strict=True)] == expected


def simulate_capability(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


CAPABILITIES = [
    ((6, 1), "fp32"),
    ((7, 0), "fp16"),
    ((7, 5), "fp16"),
    ((8, 0), "bf16"),
    ((8, 9), "bf16"),
    ((9, 0), "bf16"),
    ((12, 0), "bf16"),
]


@pytest.mark.parametrize(("capability", "precision"), CAPABILITIES)
def test_auto_precision(monkeypatch, capability, precision):
    simulate_capability(monkeypatch, capability)
    assert devices.auto_precision(GPU) == precision
    assert devices.auto_precision(CPU) == "fp32"


@pytest.fixture
def one_rank(monkeypatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)


@pytest.mark.parametrize(
    ("capability", "given", "chosen", "warned"),
    [
        ((7, 5), "auto", "fp16", False),
        ((7, 5), "bf16", "bf16", True),
        ((7, 5), "fp64", "fp64", False),
        ((6, 1), "fp16", "fp16", True),
        ((6, 1), "auto", "fp32", False),
        ((8, 0), "bf16", "bf16", False),
        ((8, 0), "fp16", "fp16", False),
    ],
)
def test_emulated_precision_is_reported_in_one_line(monkeypatch, caplog, one_rank, capability, given, chosen, warned):
    simulate_capability(monkeypatch, capability)
    with caplog.at_level(logging.WARNING):
        assert devices.choose_precision(given, [GPU]) == chosen
    assert [record.getMessage().startswith(f"precision {given}: ") for record in caplog.records] == [True] * warned


@pytest.mark.parametrize(("flags", "warned"), [("flags : fpu avx512f", True), ("flags : avx512_bf16 avx2", False)])
def test_bf16_on_a_cpu_without_instructions_for_it(monkeypatch, tmp_path, caplog, one_rank, flags, warned):
    (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(devices, "Path", lambda name: tmp_path / "cpuinfo")
    assert devices.choose_precision("bf16", [CPU]) == "bf16"
    assert len(caplog.records) == warned
    assert devices.choose_precision("auto", [CPU]) == "fp32"
    assert len(caplog.records) == warned


def choose_on_ranks(capabilities: list[tuple[int, int]]) -> str:
    capability = tuple(capabilities[dist.get_rank()])
    torch.cuda.get_device_capability = lambda device: capability  # type: ignore[assignment]
    return devices.choose_precision("auto", [GPU])


def test_all_ranks_choose_the_precision_of_the_oldest_gpu():
    assert run_function(2, __name__, "choose_on_ranks", capabilities=[(8, 0), (7, 5)]) == ["fp16"] * 2


def test_peak_counts_all_local_gpus_and_waits_once_for_many_products(monkeypatch):
    products, waits = [], []
    meta = torch.device("meta")
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: randn(*shape, device=meta, dtype=dtype))
    monkeypatch.setattr(torch, "mm", lambda a, b, out: products.append(out))
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    ticks = iter(range(1000))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: float(next(ticks)))  # a second per look
    one = devices.measure_peak([GPU], torch.float16, seconds=4)
    started, waited = len(products), len(waits)
    two = devices.measure_peak([GPU, torch.device("cuda", 1)], torch.float16, seconds=4)
    assert two == 2 * one
    assert started >= 8 * waited
    assert devices.measure_peak([CPU, CPU], torch.float32, seconds=4) == devices.measure_peak([CPU], torch.float32, 4)
