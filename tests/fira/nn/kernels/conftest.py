"""Fused and plain forms of a function are compared on the CPU, where Triton's interpreter runs the kernels."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from fira.nn.kernels import fused

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


def convert(values, source, target, rounding):
    """The interpreter's conversion of floating-point numbers, except that it truncates to bf16; a GPU does not."""
    numbers = torch.frombuffer(bytearray(values.tobytes()), dtype=DTYPES[str(source)]).to(DTYPES[str(target)])
    return numbers.view(torch.uint8).numpy().view(f"uint{target.primitive_bitwidth}").reshape(np.shape(values))


class Interpreted:
    """Calls a function with its fused forms on the CPU. launches: names of the kernels, in the order of their start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.launches: list[str] = []

    def __call__(self, function: Callable, *arguments):
        call = interpreter.GridExecutor.__call__

        def record(executor, *tensors, **options):
            self.launches.append(executor.fn.__name__)
            return call(executor, *tensors, **options)

        with self.monkeypatch.context() as patch:
            patch.setattr(fused, "DEVICE", "cpu")
            patch.setattr(interpreter, "_convert_float", convert)
            patch.setattr(interpreter.GridExecutor, "__call__", record)
            return function(*arguments)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Interpreted:
    return Interpreted(monkeypatch)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result of a function, and the gradients of its inputs for a random gradient of the result."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    y = function(*leaves)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x for x in leaves if x.requires_grad], grad)]


@pytest.fixture
def compare(interpreted: Interpreted) -> Callable[..., list[str]]:
    """compare(function, *inputs, atol=): fused against plain, in values, gradients and dtypes; returns the kernels."""

    def check(function: Callable[..., Tensor], *inputs: Tensor, rtol: float = 0.0, atol: float = 0.0) -> list[str]:
        interpreted.launches.clear()
        plain = with_gradients(function, *inputs)
        assert not interpreted.launches
        for one, other in zip(interpreted(with_gradients, function, *inputs), plain, strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol)  # compares dtypes as well
        return list(interpreted.launches)

    return check
