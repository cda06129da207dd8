"""Models and the trainer on a GPU without data: devices are not mixed, the host does not wait, kernels are counted."""

import functools
import json
import subprocess
import sys
from typing import Any

import pytest

from tests.launch import ROOT, inherited

CASES: dict[str, Any] = {
    "mix": ["mix_devices", {}],
    "read": ["read_value", {}],
    "layer": ["count_layer", {"preset": "fira-base", "fused": False}],
    "fused layer": ["count_layer", {"preset": "fira-base", "fused": True}],
    "bf16": ["train", {"preset": "fira-tiny"}],
    "fp32": ["train", {"preset": "fira-tiny", "precision": "fp32", "layers": 1}],
    "experts": ["train", {"preset": "fira-tiny", "layout": [1, 2, 2], "layers": 1}],
}
# Kernels of a block of fira-base in bf16 with dropout, forward and backward. Update a number with the reason.
KERNELS = {"layer": 301, "fused layer": 146}
SUMS = {"fira/training/trainer.py: all_reduce": 1}  # the results of a step
SIZES = "fira/nn/moe/grouped_linear.py: sizes"  # without a grouped kernel, once per layer and micro-batch
PLAN = "fira/parallel/expert_parallel.py: plan"  # with experts on several ranks, once per layer and micro-batch


@functools.cache
def results() -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "tests.integration.fake_gpu_runs"],
        input=json.dumps([[9, 0], list(CASES.values())]),
        capture_output=True,
        text=True,
        env=inherited(),
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stderr
    return dict(zip(CASES, json.loads(process.stdout), strict=True))


def test_device_detects_mixed_devices_and_reads():
    assert "FakeTensorDeviceMismatchError" in results()["mix"]["error"]
    assert "DataDependentOutputException" in results()["read"]["error"]


def test_host_waits_only_where_documented():
    for name, places in (("bf16", set()), ("fp32", {SIZES}), ("experts", {PLAN})):
        step = results()[name]["step"]
        assert set(step["reads"]) == places, name
        assert step["downloads"] == SUMS, name


@pytest.mark.parametrize("case", KERNELS)
def test_kernels_of_a_layer(case):
    counts = results()[case]
    assert sum(counts.values()) == KERNELS[case], f"{sum(counts.values())} kernels, by operator: {counts}"
