"""torch.compile for the parts of blocks whose tensors have the same shapes in every micro-batch.

    block ─┬─ attend ─────────── compiled       attention, norms, dropout and residual connection
           ├─ moe ─┬─ router ─── compiled
           │       ├─ dispatch ─ not compiled   the numbers of rows depend on the data
           │       └─ experts ── not compiled
           └─ add_experts ────── compiled       dropout, norms and residual connection

A class names its methods that can be compiled in `compilable`. The function of the class is compiled, not the method of
each object: weights are inputs of the graph, and all blocks whose tensors have equal shapes share it. Only these
methods are replaced, so parameters keep their names.
"""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fira.errors import UserError
from fira.nn.attention import SelfAttention
from fira.nn.dropout import Dropout
from fira.nn.moe.router import Router


class _Compiled:
    """A method of a module that runs as a compiled function for training inputs of the first one's shape.

    Calls with other shapes, such as a smaller last micro-batch, and calls without gradients run the method itself. A
    graph is therefore compiled once, in the first step, and never for validation or generation.
    """

    def __init__(self, method: MethodType, compiled: Callable[..., Any]) -> None:
        self.method = method
        self.compiled = compiled
        self.shape: torch.Size | None = None

    def __call__(self, x: Tensor, *arguments: Any) -> Any:
        if not torch.is_grad_enabled() or self.shape not in (None, x.shape):
            return self.method(x, *arguments)
        self.shape = x.shape
        return self.compiled(self.method.__self__, x, *arguments)


def compile_blocks(modules: Iterable[nn.Module], length: int, backend: str = "inductor") -> None:
    """Compile the methods that the modules name in `compilable`, in place.

    modules: all modules of this rank, initialised on their device. length: tokens per sequence. backend: of
    torch.compile.
    """
    from torch._functorch import config

    config.donated_buffer = False  # overwriting saved tensors would forbid the retain_graph=True of a split backward
    torch.compiler.reset()  # graphs of an earlier model would count towards the limit of graphs per function
    functions: dict[Callable[..., Any], Callable[..., Any]] = {}
    for module in modules:
        _make_equal(module, length)
        for name in getattr(module, "compilable", ()):
            function = getattr(type(module), name)
            if function not in functions:
                functions[function] = torch.compile(function, dynamic=False, fullgraph=True, backend=backend)
            setattr(module, name, _Compiled(getattr(module, name), functions[function]))


def _make_equal(module: nn.Module, length: int) -> None:
    """Change attributes that differ between blocks or between calls, and would cause a compilation each time."""
    if isinstance(module, Dropout | Router):
        module.salt = torch.tensor(int(module.salt), dtype=torch.int32)  # a tensor is an input of the graph
    if isinstance(module, SelfAttention) and module.rotary is not None:  # compute the angles that the first call would
        weight = module.q.weight
        module.rotary.cos_sin(length, torch.promote_types(weight.dtype, torch.float32), weight.device)


def check_compiler(device: torch.device) -> None:
    """Compile a small function. Raises UserError if torch.compile does not work on this machine."""
    try:
        torch.compile(_double, dynamic=False, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if not line.startswith("backend=")), type(error).__name__)
        needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler such as g++"
        raise UserError(
            f"--compile: torch.compile does not work here ({reason}); install {needed}, or leave out --compile"
        ) from None


def _double(x: Tensor) -> Tensor:
    return x + x
