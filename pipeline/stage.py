"""A stage: a contiguous run of layers, its forward, and its backward one micro-batch at a time.

A layer is any module called as `layer(x, context)`; one tensor crosses a boundary. The context is whatever the caller
hands to every layer beside its input; a stage on one device does not look inside.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.split_backward import SplitBackward, run_backward


class Autocast(nn.Module):
    """A layer under a precision. Autocast belongs to a thread, so it is entered where the layer runs."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layer = layer
        self.dtype = dtype

    def forward(self, x: Tensor, context: Any) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            return self.layer(x, context)


class Segment(Protocol):
    """Layers called as one. splits: whether their graph can be walked in two halves, which recomputation hides."""

    splits: bool

    def __call__(self, x: Tensor, context: Any) -> Tensor: ...


class DeviceLayers(nn.Module):
    """Layers one after another on one device. With recompute only each layer's input is kept, and it runs again."""

    def __init__(
        self, layers: Sequence[nn.Module], autocast: torch.dtype | None = None, recompute: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Autocast(layer, autocast) for layer in layers)
        self.recompute = recompute
        self.splits = not recompute

    def forward(self, x: Tensor, context: Any) -> Tensor:
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                # A layer's randomness comes from its context, so there is no generator to put back.
                x = checkpoint(layer, x, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, context)
        return x


class Stage:
    """Runs the forward and backward of its layers for several micro-batches in flight.

    module: its layers. input_device: where they want their input. before: layers that come before the module's, kept
    apart because they do not split as it does. What does not split is done whole in the first half of a backward.
    """

    def __init__(self, module: Segment, input_device: torch.device, before: Segment | None = None) -> None:
        self.segments = [module] if before is None else [before, module]
        self.input_device = input_device
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}  # each segment's input and output
        self._weights: dict[int, list[Callable[[], object]]] = {}  # the second half of backwards

    def forward(self, microbatch: int, x: Tensor, context: Any) -> Tensor:
        """The stage's output; where gradients are enabled, inputs and outputs are kept for `backward`."""
        kept = []
        for segment in self.segments:
            if x.is_floating_point():
                x = x.detach().requires_grad_(torch.is_grad_enabled())
            y = segment(x, context)
            kept.append((x, y))
            x = y
        if torch.is_grad_enabled():
            self._kept[microbatch] = kept
        return x

    def backward(self, microbatch: int, gradient: Tensor) -> Tensor | None:
        """Accumulate parameter gradients; the gradient of the stage's input, None where that was no float."""
        return _backward(self._kept.pop(microbatch), gradient)

    def backward_input(self, microbatch: int, gradient: Tensor) -> Tensor | None:
        """The first half of `backward`: what it returns. The rest waits for `backward_weights`."""
        kept = self._kept.pop(microbatch)
        if not kept[0][0].requires_grad:  # tokens: nobody waits for anything
            self._weights[microbatch] = [lambda: _backward(kept, gradient)]
            return None
        later: list[Callable[[], object]] = []
        of_x: Tensor | None = gradient
        for segment in reversed(self.segments):
            assert of_x is not None
            x, y = kept.pop()
            if segment.splits:
                split = SplitBackward(y, x)
                of_x = split.input_gradient(of_x)
                later.append(split.weight_gradients)
            else:
                of_x = _backward([(x, y)], of_x)
        self._weights[microbatch] = later
        return of_x

    def backward_weights(self, microbatch: int) -> None:
        """The second half of `backward`."""
        for work in self._weights.pop(microbatch):
            work()

    def clear(self) -> None:
        """Forget micro-batches whose backward never came."""
        self._kept.clear()
        self._weights.clear()


def _backward(kept: list[tuple[Tensor, Tensor]], gradient: Tensor | None) -> Tensor | None:
    """Through segments, the last first, each forgotten as it is done; the gradient of the first one's input."""
    while kept:
        x, y = kept.pop()
        assert gradient is not None
        run_backward([y], [gradient])
        gradient = x.grad
    return gradient
