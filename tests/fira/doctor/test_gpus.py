"""Findings about torch, driver, GPUs, NCCL and Triton, for machines that are described by their facts."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from fira.devices import auto_precision
from fira.doctor import gpus
from fira.doctor.device_probe import DeviceFacts, Gpu
from fira.doctor.finding import Finding, Level
from fira.doctor.gpus import device_findings, find_devices
from fira.doctor.limited_process import Outcome

T4 = Gpu("Tesla T4", (7, 5), int(15.6e9), int(15.8e9), "fp16")
H100 = Gpu("NVIDIA H100", (9, 0), int(84e9), int(85e9), "bf16")
TWO_T4 = DeviceFacts(
    torch="2.13.0+cu126",
    cuda="12.6",
    architectures=("sm_70", "sm_75", "sm_80", "sm_90", "compute_90"),
    driver=12040,
    driver_release="550.54.15",
    error="",
    gpus=(T4, T4),
    peers=((True, False), (False, True)),
    nccl="2.27.5",
    triton="3.4.0",
    compiler="/usr/bin/gcc",
)
CPU = replace(
    TWO_T4, torch="2.13.0+cpu", cuda=None, architectures=(), driver=None, driver_release="", gpus=(), peers=()
)
DONE = Outcome(0, "", 1.0, 0)


def findings(facts: DeviceFacts | None, outcome: Outcome = DONE) -> dict[str, Finding]:
    return {finding.subject: finding for finding in device_findings(facts, outcome)}


def problems(facts: DeviceFacts) -> dict[str, tuple[str, str]]:
    """Text and remedy of all findings that are not OK."""
    return {s: (f.text, f.remedy) for s, f in findings(facts).items() if f.level is not Level.OK}


def test_two_t4_without_a_problem():
    found = findings(TWO_T4)
    assert problems(TWO_T4) == {}
    assert {subject: finding.text for subject, finding in found.items()} == {
        "torch": "2.13.0+cu126, CUDA 12.6",
        "NVIDIA driver": "550.54.15 supports CUDA 12.4, torch needs 12.6",
        "cuda:0": "Tesla T4, sm_75, 15.6 of 15.8 GB free",
        "cuda:1": "Tesla T4, sm_75, 15.6 of 15.8 GB free",
        "Triton": "3.4.0, compiler /usr/bin/gcc",
        "NCCL": "2.27.5",
        "peer access": "between no GPUs; their transfers pass through host memory",
        "precision": "auto selects fp16; bf16 would be emulated",
    }


def test_a_cpu_is_no_problem_and_has_no_lines_about_gpus():
    assert problems(CPU) == {}
    assert list(findings(CPU)) == ["torch", "NVIDIA driver", "precision"]
    assert findings(CPU)["precision"].text == "auto selects fp32"


def test_peers_of_some_gpus():
    peers = ((True, True, False), (True, True, True), (False, True, True))
    text = findings(replace(TWO_T4, gpus=(H100,) * 3, peers=peers))["peer access"].text
    assert text == "not between 0–2; their transfers pass through host memory"


@pytest.mark.parametrize(
    ("changes", "subject", "text", "remedy"),
    [
        ({"torch": "2.5.1+cu124"}, "torch", "2.5.1+cu124, CUDA 12.6; too old", 'pip install "torch>=2.6"'),
        ({"driver": 11040}, "NVIDIA driver", "supports CUDA 11.4; too old for torch's CUDA 12.6", "update the driver"),
        ({"cuda": "13.0"}, "NVIDIA driver", "too old for torch's CUDA 13.0", "install torch for CUDA 12"),
        ({"cuda": None}, "NVIDIA driver", "but torch is built without CUDA", "/whl/cu124"),
        ({"gpus": (), "error": "no device"}, "NVIDIA driver", "torch cannot use it: no device", "--gpus all"),
        ({"gpus": ()}, "NVIDIA driver", "but torch sees no GPU", "CUDA_VISIBLE_DEVICES"),
        ({"architectures": ("sm_80", "sm_90")}, "cuda:0", "torch has kernels for sm_80, sm_90 only", "supports sm_75"),
        ({"architectures": ("sm_90", "compute_90")}, "cuda:1", "kernels for sm_90, compute_90 only", "--device cpu"),
        ({"gpus": (replace(T4, free=int(2e9)),)}, "cuda:0", "2.0 of 15.8 GB free; in use", "nvidia-smi"),
        ({"triton": None}, "Triton", "not installed: kernels are not fused", "pip install triton"),
        ({"compiler": None}, "Triton", "3.4.0, but no C compiler", "install gcc"),
        ({"nccl": None}, "NCCL", "not in this build of torch", "install torch from"),
    ],
)
def test_problems(changes, subject, text, remedy):
    found = problems(replace(TWO_T4, **changes))
    assert text in found[subject][0]
    assert remedy in found[subject][1]
    assert "\n" not in found[subject][1]


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        (("sm_80",), (8, 6), True),
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("compute_80",), (9, 0), True),
        (("sm_90a",), (9, 0), True),
        (("sm_120",), (12, 0), True),
    ],
)
def test_kernels_run_on_the_same_major_version(architectures, capability, fits):
    facts = replace(TWO_T4, gpus=(replace(T4, capability=capability),), architectures=architectures)
    assert ("cuda:0" in problems(facts)) is not fits


def test_torch_that_fails_or_hangs_makes_training_impossible():
    (finding,) = findings(None, Outcome(1, "ImportError: libcudart.so.12: not found\n", 1.0, 0)).values()
    assert (finding.level, finding.text) == (
        Level.FATAL,
        "cannot be imported: ImportError: libcudart.so.12: not found",
    )
    (finding,) = findings(None, Outcome(None, "", 120.0, 0)).values()
    assert (finding.level, finding.text) == (Level.FATAL, "torch has not answered within 120 s")


def test_facts_that_a_program_prints(monkeypatch):
    output = f"a warning\n{json.dumps(asdict(TWO_T4))}\n"
    monkeypatch.setattr(gpus, "run_limited", lambda *_: replace(DONE, output=output))
    facts, outcome = find_devices()
    assert device_findings(facts, outcome) == device_findings(TWO_T4, DONE)


def test_facts_of_this_machine():
    facts, _ = find_devices()
    assert facts is not None
    assert (facts.torch, facts.cuda) == (torch.__version__, torch.version.cuda)
    assert len(facts.gpus) == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("capability", "selected"),
    [((6, 0), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")],
)
def test_automatic_precision(monkeypatch, capability, selected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert auto_precision(torch.device("cuda", 0)) == selected
    assert auto_precision(torch.device("cpu")) == "fp32"
