"""Selection and launch of the fused kernels in this folder.

A function of `fira.nn` computes its plain form from PyTorch's operators. If `use_fused` is true for its tensors, it
calls the fused form instead: an autograd.Function in this folder with Triton kernels. Its values and gradients are
those of the plain form up to rounding, and its dtypes are the same.

The number of rows differs from call to call, so that no kernel is specialised on it (`count`): a new number would
otherwise compile the kernel again.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"  # the type of device that runs the kernels; tests interpret them on the CPU


def use_fused(*tensors: Tensor) -> bool:
    """Whether to use a fused form: the tensors are on a GPU and not in fp64, and Triton is installed.

    torch.compile gets the plain form, which it fuses with the operators around it.
    """
    on_gpu = all(x.device.type == DEVICE and x.dtype != torch.float64 for x in tensors)
    return on_gpu and not torch.compiler.is_compiling() and has_triton()


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, unless the grid is empty."""
    if all(grid):
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
            kernel[grid](*arguments, **constants)


def tiles(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile size of an elementwise kernel on [rows, width]: tiles have at most 2,048 elements."""
    columns = min(256, power_of_two(width))  # 512 bytes in bf16, which one warp reads at a time
    height = min(2048 // columns, power_of_two(rows))
    return (ceil_div(rows, height), ceil_div(width, columns)), {"ROWS": height, "COLUMNS": columns}


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉"""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
