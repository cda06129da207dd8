"""The memory of the tensors that a layer allocates for one micro-batch.

    start          forward              backward
    ──────┬────────────────────┬────────────────────────┬──
          │      peak          │       peak             │
          │   ╱‾‾‾‾‾‾╲         │     ╱‾‾‾‾‾╲            │
          │  ╱        ╲_ output│    ╱       ╲__________ │  gradients of input and weights
          │ ╱           saved  │ __╱                    │

Tensors are followed by their storages, from the operation that returns the first tensor of a storage to the end of the
last one. Temporary memory within an operation is not counted.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fira.nn.context import Context
from pipeline.split_backward import SplitBackward, run_backward


class LayerMemory(NamedTuple):
    """Bytes of a layer's tensors for one micro-batch, on a rank that holds all of its experts.

    The peak of a pass is what it allocates at most, beyond what is allocated at its start; that of a backward includes
    the gradient of the output, and the gradients of the weights.
    """

    saved: float = 0  # from the forward to the end of the backward, without input and output
    saved_for_weight_grad: float = 0  # between the two halves of a split backward
    forward: float = 0  # the peaks
    backward: float = 0
    backward_input: float = 0
    backward_weight: float = 0

    def map(self, function: Callable[..., float], *others: Self) -> "LayerMemory":
        """The results of a function for each field of this one and of others."""
        return LayerMemory(*map(function, self, *others))


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate in this context, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}  # storage → bytes that are counted

    def restart(self) -> int:
        """Begin a peak, and return the bytes that are allocated now."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, *(kwargs or {}).values())):
            self._follow(tensor, counts=False)  # the caller's, unless an operation has returned it
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((result,)):
            self._follow(tensor, counts=True)
        return result

    def _follow(self, tensor: Tensor, counts: bool) -> None:
        """Count the bytes of a tensor's storage from now until it is freed, if it is not known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if counts else 0
        self.now += self._known[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)


class _FreshGradient(torch.autograd.Function):
    """The end of a graph, whose backward allocates the gradient of y as the next layer would."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape = y.shape
        ctx.dtype = y.dtype
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_ones(ctx.shape, dtype=ctx.dtype)


def measure_layer_memory(layer: nn.Module, x: Tensor, context: Context, parameters: Sequence[Tensor]) -> LayerMemory:
    """Run a layer's forward and backward, and again with a split backward, and follow its tensors.

    x: requires a gradient unless it has tokens. parameters: those of the layer, whose gradients are freed.
    """
    one = torch.ones((), device=x.device)
    kept = backward_input = backward_weight = backward = 0
    _free_gradients(x, *parameters)
    with AllocatedBytes() as allocated:

        def peak(work: Callable[..., object], *arguments: Any) -> int:
            start = allocated.restart()
            work(*arguments)
            return allocated.peak - start

        start = allocated.restart()
        y = layer(x, context)
        forward, saved = allocated.peak - start, allocated.now - start - y.untyped_storage().nbytes()
        end = _FreshGradient.apply(y)
        del y
        if end.requires_grad:  # not if all parameters of the first layer are frozen
            backward = peak(run_backward, [end], [one])
            _free_gradients(x, *parameters)
        if x.requires_grad:
            end = _FreshGradient.apply(layer(x, context))
            split, start = SplitBackward(end, x), allocated.now
            backward_input = peak(split.backward_input, one)
            kept = allocated.now - start - sum(p.grad.nbytes for p in parameters if p.grad is not None)
            backward_weight = peak(split.backward_weight)
            _free_gradients(*parameters)
    return LayerMemory(saved, kept, forward, backward, backward_input, backward_weight)


def _free_gradients(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.grad = None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments or results of an operation. A tree of torch's pytree would take twice as long."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
