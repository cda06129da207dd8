"""Compilation of the parts of blocks whose tensors have the same shapes in every micro-batch.

    block ─ attend ──────────── compiled      attention, norms, dropout and residual connections
          ─ moe ─ router ────── compiled
                ─ dispatch ──── not compiled  numbers of rows depend on the data
                ─ experts ───── not compiled
          ─ add_experts ─────── compiled

A class lists its methods that can be compiled in `compilable`. torch.compile gets the function of the class, not the
method of one object: weights are inputs of the graph, and all blocks whose tensors have equal shapes share it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fira.nn.dropout import Dropout
from fira.nn.moe.router import Router
from fira.nn.rotary import Rotary


class _Compiled:
    """A method of one module, compiled for the shape of its first input in training.

    Calls with other shapes, such as the last, smaller micro-batch, and calls without gradients run the method itself.
    So there is one compilation, in the first step.
    """

    def __init__(self, method: Any, function: Any) -> None:
        self.method = method
        self.function = function
        self.shape: torch.Size | None = None

    def __call__(self, x: Tensor, *arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.method(x, *arguments)
        if self.shape is None:
            self.shape = x.shape
        if x.shape != self.shape:
            return self.method(x, *arguments)
        return self.function(self.method.__self__, x, *arguments)


def compile_blocks(layers: Iterable[nn.Module], length: int, backend: str = "inductor") -> None:
    functions: dict[Any, Any] = {}
    for module in (module for layer in layers for module in layer.modules()):
        for value in vars(module).values():
            if isinstance(value, Rotary):
                pass
        if isinstance(module, Dropout | Router):
            module.salt = torch.tensor(module.salt, dtype=torch.int32)
        for name in getattr(module, "compilable", ()):
            function = getattr(type(module), name)
            if function not in functions:
                functions[function] = torch.compile(function, dynamic=False, fullgraph=True, backend=backend)
            setattr(module, name, _Compiled(getattr(module, name), functions[function]))
