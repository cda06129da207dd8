"""Triton's interpreter, which runs the kernels on the CPU without compiling them."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


def _round_to_nearest(values, source, target, rounding):
    """The interpreter's conversion of floating-point numbers, except that it truncates to bf16; a GPU does not."""
    numbers = torch.frombuffer(bytearray(values.tobytes()), dtype=DTYPES[str(source)]).to(DTYPES[str(target)])
    return numbers.view(torch.uint8).numpy().view(f"uint{target.primitive_bitwidth}").reshape(np.shape(values))


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_convert_float", _round_to_nearest)
