"""A pipeline stage: a contiguous run of layers with its forward and its backward, one micro-batch at a time.

    x ──► segment 0 ──► segment 1 ──► y        forward(i)           keeps each segment's input and output
    dx ◄─ segment 0 ◄── segment 1 ◄── dy       backward(i)          dx; adds to the parameters' .grad
                                               backward_input(i)    dx only, as early as possible
                                               backward_weight(i)   adds to the parameters' .grad, later

A layer is any module called as `layer(x, context)` that returns one tensor. The context is an object that the caller
passes to every layer with the input; a stage on one device does not read it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.mpi.activity import doing
from pipeline.split_backward import SplitBackward, run_backward


class Autocast(nn.Module):
    """A layer that runs under autocast to a dtype (None: disabled). Autocast is per thread, so each call enters it."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layer = layer
        self.dtype = dtype

    def forward(self, x: Tensor, context: Any) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            return self.layer(x, context)


class Segment(Protocol):
    """Consecutive layers that a stage calls as one.

    splits_backward: whether their backward can be split. This requires the complete autograd graph, which is not
    available with recomputation and with torchgpipe.
    """

    splits_backward: bool

    def __call__(self, x: Tensor, context: Any) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...


class DeviceLayers(nn.Module):
    """Layers in sequence on one device. With recompute (activation checkpointing) only each layer's input is kept.

    first: number of the first layer in error messages.
    """

    def __init__(
        self, layers: Sequence[nn.Module], autocast: torch.dtype | None = None, recompute: bool = False, first: int = 0
    ) -> None:
        super().__init__()
        self.first = first
        self.layers = nn.ModuleList(Autocast(layer, autocast) for layer in layers)
        self.recompute = recompute
        self.splits_backward = not recompute

    def forward(self, x: Tensor, context: Any) -> Tensor:
        for number, layer in enumerate(self.layers, self.first):
            with doing(f"layer {number}"):
                if self.recompute and torch.is_grad_enabled():
                    # The randomness of a layer comes from its context, so there is no generator state to restore.
                    x = checkpoint(layer, x, context, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = layer(x, context)
        return x


class Stage:
    """Run the forward and backward of a stage for several micro-batches in flight.

    module: the layers. input_device: the device of the stage's input. before: segments that run before module. Layers
    form a separate segment if only some of them can split their backward; the full backward of a segment that cannot
    is part of `backward_input`. around(segment): context manager in which the forward, the backward, or each part of
    the backward of the segment with this number runs.
    """

    def __init__(
        self,
        module: Segment,
        input_device: torch.device,
        before: Sequence[Segment] = (),
        around: Callable[[int], AbstractContextManager[None]] = lambda segment: nullcontext(),
    ) -> None:
        self.segments = [*before, module]
        self.input_device = input_device
        self._around = around
        self._saved: dict[int, list[tuple[Tensor, Tensor]]] = {}  # micro-batch → (input, output) of each segment
        self._weight_backwards: dict[int, list[Callable[[], object]]] = {}  # micro-batch → calls of backward_weight

    def forward(self, microbatch: int, x: Tensor, context: Any) -> Tensor:
        """Return the output; where gradients are enabled, keep the segments' inputs and outputs for the backward."""
        saved = []
        for number, segment in enumerate(self.segments):
            if x.is_floating_point():
                x = x.detach().requires_grad_(torch.is_grad_enabled())
            with self._around(number):
                y = segment(x, context)
            saved.append((x, y))
            x = y
        if torch.is_grad_enabled():
            self._saved[microbatch] = saved
        return x

    def backward(self, microbatch: int, grad_output: Tensor) -> Tensor | None:
        """Add to the parameters' `.grad` and return the gradient of the stage's input, None for integer inputs."""
        return self._backward(self._saved.pop(microbatch), grad_output)

    def backward_input(self, microbatch: int, grad_output: Tensor) -> Tensor | None:
        """The first part of `backward`, with its result. `backward_weight` must follow."""
        saved = self._saved.pop(microbatch)
        if not saved[0][0].requires_grad:  # integer inputs: no other stage waits for a gradient
            self._weight_backwards[microbatch] = [lambda: self._backward(saved, grad_output)]
            return None
        weight_backwards: list[Callable[[], object]] = []
        grad: Tensor | None = grad_output
        for number, segment in reversed([*enumerate(self.segments)]):
            assert grad is not None
            if not segment.splits_backward:
                grad = self._segment_backward(number, *saved.pop(), grad)
                continue
            split = SplitBackward(*reversed(saved.pop()))
            with self._around(number):
                grad = split.backward_input(grad)
            weight_backwards.append(functools.partial(self._weight_backward, number, split))
        self._weight_backwards[microbatch] = weight_backwards
        return grad

    def backward_weight(self, microbatch: int) -> None:
        """The second part of `backward`: add the remaining gradients to the parameters' `.grad`."""
        for run in self._weight_backwards.pop(microbatch):
            run()

    def clear(self) -> None:
        """Drop the tensors of micro-batches whose backward did not run, for example after an error."""
        self._saved.clear()
        self._weight_backwards.clear()

    def _backward(self, saved: list[tuple[Tensor, Tensor]], grad: Tensor | None) -> Tensor | None:
        """Run backward through all segments, freeing each; return the gradient of the first input."""
        while saved:
            number = len(saved) - 1
            grad = self._segment_backward(number, *saved.pop(), grad)
        return grad

    def _segment_backward(self, number: int, x: Tensor, y: Tensor, grad: Tensor | None) -> Tensor | None:
        assert grad is not None
        if y.requires_grad:  # not if all parameters of the first segment are frozen
            with self._around(number):
                run_backward([y], [grad])
        return x.grad

    def _weight_backward(self, number: int, split: SplitBackward) -> None:
        with self._around(number):
            split.backward_weight()
