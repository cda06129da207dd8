"""Models and the trainer on a GPU without data: devices are not mixed, the host does not wait, kernels are counted."""

import functools
import json
import subprocess
import sys
from itertools import product
from typing import Any

import pytest

from fira.models.registry import FAMILIES, PRESETS
from tests.launch import ROOT, inherited
from tests.torch_versions import needs_fake_work

pytestmark = needs_fake_work
MICROBATCHES = 2
# Kernels of a block of <family>-base in bf16 with dropout, forward and backward: by PyTorch's operators, and with the
# fused kernels. Update a number with the reason.
KERNELS = {
    "fira": (299, 144),
    "rish": (266, 245),
    "mooshak": (149, 140),
    "blues": (370, 281),
    "microrwkv": (684, 669),
}
# Kernels and casts of a step of fira-base with one block in bf16, without dropout, for 2 and 4 micro-batches. If every
# micro-batch cast the seven matrices and converted their gradients, it would be 457 and 89, and 903 and 173.
STEP = {2: (445, 68), 4: (867, 126)}
# The places at which the host waits in a training step, in an evaluation and in generation, as in docs/architecture.md
SUMS = "fira/training/trainer.py: all_reduce"  # the results of a step
SIZES = "fira/nn/moe/grouped_linear.py: sizes"  # without a grouped kernel, once per MoE layer and micro-batch
PLAN = "fira/parallel/expert_parallel.py: plan"  # with experts on several ranks, once per MoE layer and micro-batch
EVALUATE = "fira/parallel/forward_pass.py: mean"  # once
CHOSEN = "fira/decoding/decoding.py: continuation"  # once per generated token
# The copies to the device for which the host does not wait: tokens, and what `Context` has for each sequence
TOKENS, CONTEXT = "pipeline/engine.py: _input", "fira/nn/context.py: apply"
DOCUMENTS = "fira/nn/context.py: _map"
EXTRA = "fira/training/trainer.py: _step_sums"
EXPERTS = {"layout": [1, 2, 2]}  # dp × ep = 2 × 2
PRECISIONS = ("bf16", "fp16", "fp32")
LONG = {"changes": {"seq_len": 512}}  # 1,024 tokens per micro-batch, in blocks of at least 256

QUICK: dict[str, Any] = {
    "mix": ["mix_devices", {}],
    "read": ["read_value", {}],
    "update": ["update", {}],
    "bf16": ["train", {"preset": "fira-tiny"}],
    "fp32": ["train", {"preset": "fira-tiny", "precision": "fp32"}],
    **{f"step of {n}": ["train", {"preset": "fira-base", "dropout": False, "microbatches": n}] for n in (2, 4)},
    "experts": ["train", {"preset": "fira-tiny", **EXPERTS}],
    "experts in parts": ["train", {"preset": "fira-tiny", **EXPERTS, "between_machines": True}],
    "packed": ["train", {"preset": "fira-tiny", "changes": {"capacity_factor": 1.0}, "packed": True}],
    "packed, dynamic rotary base": ["train", {"preset": "rish-tiny", "changes": {"max_position": 3}, "packed": True}],
    "packed rwkv": ["train", {"preset": "microrwkv-tiny", "packed": True}],
    "decode": ["decode", {"preset": "fira-base", "precision": "bf16"}],
    "decode rwkv": ["decode", {"preset": "microrwkv-tiny", "precision": "bf16"}],
    "generate": ["generate", {"preset": "fira-tiny", "rows": 2}],
    **{name: ["count_layer", {"preset": f"{name}-base", "fused": False}] for name in FAMILIES},
    **{f"{name} fused": ["count_layer", {"preset": f"{name}-base", "fused": True}] for name in FAMILIES},
}


def plain_step(family: str, size: str, precision: str) -> dict[str, Any]:
    """A training step. Dropout alternates, so that it is on and off with each size and with each precision."""
    dropout = hasattr(PRESETS[f"{family}-base"], "dropout") and (size == "tiny") == (precision == "fp16")
    return {"preset": f"{family}-{size}", "precision": precision, "dropout": dropout}


def grid(family: str) -> dict[str, Any]:
    """Training steps and decodings of a family with each pair of options, by a name for messages."""
    arguments = [plain_step(family, size, precision) for size, precision in product(("tiny", "base"), PRECISIONS)]
    for step in [plain_step(family, "tiny", precision) for precision in PRECISIONS]:
        arguments += [step | {"recompute": 1}, step | LONG | {"logits": 1}]
        if hasattr(PRESETS[step["preset"]], "num_experts"):
            arguments += [step | EXPERTS | ({"recompute": 1} if step["precision"] == "bf16" else {})]
    arguments += [plain_step(family, "tiny", "fp32") | LONG]
    cases = [["train", values] for values in arguments]
    cases += [["decode", {"preset": f"{family}-{s}", "precision": p}] for s in ("tiny", "base") for p in PRECISIONS]
    cases += [["generate", {"preset": f"{family}-tiny", "rows": rows}] for rows in (1, 2)]
    return {json.dumps(case): case for case in cases}


def run(cases: dict[str, Any], capability: tuple[int, int] = (9, 0)) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "tests.integration.fake_gpu_runs"],
        input=json.dumps([capability, list(cases.values())]),
        capture_output=True,
        text=True,
        env=inherited(),
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stderr
    return dict(zip(cases, json.loads(process.stdout), strict=True))


@functools.cache
def quick() -> dict[str, Any]:
    return run(QUICK)


def layer_reads(arguments: dict[str, Any], grouped_kernel: bool, microbatches: int, passes: int) -> dict[str, int]:
    """The values that the host reads in the MoE layer, which every pass forward through the block repeats."""
    values = getattr(PRESETS[arguments["preset"]], "num_experts", 0) * microbatches * passes
    if "layout" in arguments:
        return {PLAN: 2 * values}  # assignments that are sent to and received by every expert
    return {} if grouped_kernel or not values else {SIZES: values}


def check_waits(function: str, arguments: dict[str, Any], result: dict[str, Any], grouped: bool = True) -> None:
    """Compare the waits of a case with the documented ones. grouped: whether bf16 has a kernel for grouped products."""
    assert "error" not in result, f"{arguments}: {result}"
    grouped = grouped and arguments.get("precision", "bf16") == "bf16"
    microbatches = arguments.get("microbatches", MICROBATCHES)
    if function == "train":
        step, evaluation, passes = result["step"], result["evaluation"], 1 + ("recompute" in arguments)
        assert step["reads"] == layer_reads(arguments, grouped, microbatches, passes), arguments
        assert step["downloads"] == {SUMS: 1}, arguments
        assert {"_foreach_mul_", "_fused_adamw_"} <= set(step["kernels"]), arguments  # clipping and the update
        assert evaluation["reads"] == layer_reads(arguments, grouped, microbatches, 1), arguments
        assert evaluation["downloads"] == {EVALUATE: 1}, arguments
        for part in (step, evaluation):
            assert not part["uploads"], arguments
        # tokens, lengths, targets and documents; in training keys and the weights of the auxiliary losses as well
        copies = {TOKENS: microbatches, CONTEXT: 3 * microbatches}
        if "packed" in arguments:
            copies[DOCUMENTS] = 3 * microbatches
        assert evaluation["asynchronous"] == copies, arguments
        assert step["asynchronous"] == copies | {CONTEXT: 5 * microbatches, EXTRA: 1}, arguments
    elif function == "decode":
        assert result["reads"] == layer_reads(arguments, grouped, 3, 1), arguments  # three calls of the model
        assert not result["uploads"], arguments
        assert not result["downloads"], arguments
    else:
        assert result["reads"] == {CHOSEN: 3 * arguments["rows"]}, arguments
        assert not result["downloads"], arguments
        assert set(result["uploads"]) == {CHOSEN}, arguments  # the prompts


def test_device_detects_mixed_devices_and_reads():
    assert "FakeTensorDeviceMismatchError" in quick()["mix"]["error"]
    assert "DataDependentOutputException" in quick()["read"]["error"]


def test_optimizer_updates_the_parameters_of_each_device_separately():
    """One kernel for each device and value of the weight decay; it reads no value of the device."""
    assert quick()["update"]["_fused_adamw_"] == 4


@pytest.mark.parametrize("name", [name for name, case in QUICK.items() if case[0] in ("train", "decode", "generate")])
def test_host_waits_only_where_documented(name):
    check_waits(*QUICK[name], quick()[name])


@pytest.mark.parametrize("microbatches", STEP)
def test_kernels_of_a_step(microbatches):
    result = quick()[f"step of {microbatches}"]
    assert "error" not in result, result
    counts = result["step"]["kernels"]
    assert (sum(counts.values()), counts["_to_copy"]) == STEP[microbatches], counts


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_of_a_block(family):
    for name, expected in zip((family, f"{family} fused"), KERNELS[family], strict=True):
        counts = quick()[name]
        assert sum(counts.values()) == expected, f"{name}: {sum(counts.values())} kernels, by operator: {counts}"


def test_kernels_of_an_exchange_in_two_parts():
    """The kernels that are added to a layer; half of them are dropout without the fused kernel."""
    one, two = (sum(quick()[name]["step"]["kernels"].values()) for name in ("experts", "experts in parts"))
    assert two - one == MICROBATCHES * 84


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_grid(family):
    """Both sizes in all precisions, with dropout, recomputation, a loss in blocks and experts on several ranks."""
    cases = grid(family)
    results = run(cases)
    for name, (function, arguments) in cases.items():
        check_waits(function, arguments, results[name])
    for precision in PRECISIONS:
        step = plain_step(family, "tiny", precision)
        plain, blocks, recomputed = (
            results[json.dumps(["train", step | option])]["step"]["kernels"]
            for option in ({}, LONG | {"logits": 1}, {"recompute": 1})
        )
        # The loss of each micro-batch in four blocks or one
        assert blocks["_log_softmax"] - plain["_log_softmax"] == 3 * MICROBATCHES, precision
        assert sum(recomputed.values()) > sum(plain.values()), precision


@pytest.mark.slow
def test_bf16_without_a_grouped_kernel():
    cases = {size: ["train", {"preset": f"fira-{size}"}] for size in ("tiny", "base")}
    for size, result in run(cases, capability=(8, 0)).items():
        check_waits(*cases[size], result, grouped=False)
