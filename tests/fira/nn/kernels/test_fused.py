"""Selection of the fused forms, whole models with them, and compilation of the kernels for several GPUs."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fira.models.fira import Block
from fira.models.registry import FAMILIES, PRESETS
from fira.nn.context import Context, TrainingContext
from fira.nn.dropout import Dropout
from fira.nn.kernels import fused
from pipeline.split_backward import SplitBackward
from tests.launch import ROOT

SMALL = {"vocab_size": 50, "seq_len": 9, "d_model": 16, "num_layers": 2}


def run(code: str, **env: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compiler_gets_one_graph_of_the_plain_form(interpreted) -> None:
    dropout, x, rows = Dropout(0.3, "here"), torch.randn(4, 8), torch.arange(4, dtype=torch.int32)
    compiled = torch.compile(dropout, backend="eager", fullgraph=True)
    assert torch.equal(interpreted(compiled, x, rows), dropout(x, rows))
    assert interpreted.launches == []


def test_selection_by_device_dtype_and_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert not fused.use_fused(x)
    monkeypatch.setattr(fused, "DEVICE", "cpu")
    assert fused.use_fused(x, x.bfloat16(), x.long())
    assert not fused.use_fused(x, x.double())
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    fused.has_triton.cache_clear()
    assert not fused.use_fused(x)
    fused.has_triton.cache_clear()


@pytest.mark.parametrize("preset", [f"{family}-tiny" for family in FAMILIES])
def test_models_equal_the_plain_form(preset: str, interpreted) -> None:
    """Loss and gradients of every family with dropout, routing noise and auxiliary losses."""
    family, config = FAMILIES[preset.partition("-")[0]], PRESETS[preset]
    small = {name: value for name, value in (SMALL | {"dropout": 0.3, "d_ff": 24}).items() if hasattr(config, name)}
    torch.manual_seed(0)
    model = family.model(replace(config, **small))
    tokens = torch.randint(50, (3, 9))

    def gradients() -> list[Tensor]:
        training = TrainingContext(tokens.roll(1, 1), aux_weights=torch.full((3,), 0.3))
        loss = model(tokens, Context(keys=torch.arange(3) << 33, training=training)).sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    plain = gradients()
    for one, other in zip(interpreted(gradients), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(1 + other.abs().max()))
    assert "_softmax_loss" in interpreted.launches


def test_split_backward_equals_a_full_one(interpreted) -> None:
    """With the kernels in both; the gradients of the experts' biases belong to the second part."""
    config = replace(PRESETS["fira-tiny"], d_model=16, d_ff=24, dropout=0.3, value_embeddings=False)
    torch.manual_seed(0)
    block, x = Block(config, 1), torch.randn(2, 5, 16, requires_grad=True)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    grad, context = torch.randn(2, 5, 16), Context(keys=torch.arange(2) << 33)
    full = torch.autograd.grad(interpreted(block, x, context), [x, *block.parameters()], grad)
    split = SplitBackward(interpreted(block, x, context), x)
    torch.testing.assert_close(split.backward_input(grad), full[0], rtol=0, atol=0)
    assert block.moe.experts.b1.grad is None
    split.backward_weight()
    for parameter, expected in zip(block.parameters(), full[1:], strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-6)


def test_training_on_a_cpu_does_not_import_triton() -> None:
    code = """
import sys
from fira import FIRA
from fira.models.fira import FiraConfig
import torch
from fira.nn.context import Context
model = FIRA(FiraConfig(vocab_size=11, seq_len=6, d_model=16, n_head=2, num_layers=1, d_ff=24))
model(torch.zeros(1, 6, dtype=torch.int64), Context(keys=torch.zeros(1, dtype=torch.int64))).sum().backward()
print("triton" in sys.modules)
"""
    assert run(code).split() == ["False"]


COMPILE = """
import importlib, inspect, itertools, pkgutil, sys
import fira.nn.kernels as folder
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
CONSTANTS = {"ROWS": 4, "COLUMNS": 256, "BLOCK": 1024, "COPIES": 2, "EXPERTS": 4, "IGNORED": -100}
FLAGS = ("GELU", "DROP", "SILU", "WEIGHTED", "GRADIENT")
TYPES = {"order": "*i64", "inverse": "*i64", "targets": "*i64", "ends": "*i32", "losses": "*fp32", "weights": "*fp32",
         "grad_weights": "*fp32", "scale": "fp32"}
NUMBERS = ("count", "width", "stride", "experts", "salt", "threshold", "start", "length")
for name in sorted(module.name for module in pkgutil.iter_modules(folder.__path__)):
    module = importlib.import_module(f"fira.nn.kernels.{name}")
    for kernel in vars(module).values():
        own = isinstance(kernel, JITFunction) and kernel.__module__ == module.__name__
        if not own or "tl.program_id" not in kernel.src:  # a function that kernels call
            continue
        flags = [flag for flag in FLAGS if flag in kernel.arg_names]
        options = list(itertools.product((False, True), repeat=len(flags)))
        options *= 3 if len(options) < 3 else 1  # so that each dtype occurs with each capability
        for number, values in enumerate(options):
            for place, dtype in enumerate(("fp32", "bf16", "fp16")):
                capability = (75, 80, 90)[(number + place) % 3]
                constants = {n: v for n, v in (CONSTANTS | dict(zip(flags, values))).items() if n in kernel.arg_names}
                keys = {"rows": "*i32", "keys": "*i64"} if name == "hash_dropout" else {"keys": "*i32"}
                types = TYPES | keys | dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(constants, "constexpr")
                signature = {argument: types.get(argument, f"*{dtype}") for argument in kernel.arg_names}
                if kernel.fn.__name__ == "_token_keys":
                    signature["out"] = "*i32"
                source = ASTSource(kernel, signature, constants)
                compiled = compile(source, target=GPUTarget("cuda", capability, 32))
                assert f".target sm_{capability}" in compiled.asm["ptx"], compiled.asm["ptx"][:300]
                assert compiled.asm["cubin"]
        print(kernel.fn.__name__)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_compile_for_gpus_with_and_without_bf16(tmp_path) -> None:
    """For compute capability 7.5, 8.0 and 9.0, each with every dtype and option; ptxas needs no GPU."""
    names = run(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).split()
    expected = ["_backward", "_combine", "_combine_backward", "_dropout", "_forward", "_gated", "_gated_backward"]
    assert sorted(names) == sorted([*expected, "_gather", "_softmax_loss", "_sum_by_group", "_token_keys"])
