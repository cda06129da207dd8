"""A stage: a contiguous run of layers, its forward, and its backward one micro-batch at a time.

A layer is any module called as `layer(x, context)`; one tensor crosses a boundary. The context is whatever the caller
hands to every layer beside its input; a stage on one device does not look inside.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.split_backward import SplitBackward


class Autocast(nn.Module):
    """A layer under a precision. Autocast belongs to a thread, so it is entered where the layer runs."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layer = layer
        self.dtype = dtype

    def forward(self, x: Tensor, context: Any) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            return self.layer(x, context)


class DeviceLayers(nn.Module):
    """Layers one after another on one device. With recompute only each layer's input is kept, and it runs again."""

    def __init__(
        self, layers: Sequence[nn.Module], autocast: torch.dtype | None = None, recompute: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Autocast(layer, autocast) for layer in layers)
        self.recompute = recompute

    def forward(self, x: Tensor, context: Any) -> Tensor:
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                # A layer's randomness comes from its context, so there is no generator to put back.
                x = checkpoint(layer, x, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, context)
        return x


class Stage:
    """Runs a module's forward and backward for several micro-batches in flight.

    module: called as `module(x, context)`. input_device: where it wants its input. splits: whether its graph can be
    walked in two halves; not where recomputation or torchgpipe hide it. Then the first half is the whole backward.
    """

    def __init__(self, module: nn.Module, input_device: torch.device, splits: bool = True) -> None:
        self.module = module
        self.input_device = input_device
        self.splits = splits
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._weights: dict[int, Callable[[], None]] = {}  # the second half of backwards

    def forward(self, microbatch: int, x: Tensor, context: Any) -> Tensor:
        """The stage's output; where gradients are enabled, input and output are kept for `backward`."""
        if x.is_floating_point():
            x = x.detach().requires_grad_(torch.is_grad_enabled())
        y = self.module(x, context)
        if torch.is_grad_enabled():
            self._kept[microbatch] = x, y
        return y

    def backward(self, microbatch: int, gradient: Tensor) -> Tensor | None:
        """Accumulate parameter gradients; the gradient of the stage's input, None where that was no float."""
        x, y = self._kept.pop(microbatch)
        torch.autograd.backward(y, gradient)
        return x.grad

    def backward_input(self, microbatch: int, gradient: Tensor) -> Tensor | None:
        """The first half of `backward`: what it returns. The rest waits for `backward_weights`."""
        if not self.splits:
            return self.backward(microbatch, gradient)
        x, y = self._kept.pop(microbatch)
        if not x.requires_grad:  # tokens: nobody waits for anything
            self._weights[microbatch] = lambda: torch.autograd.backward(y, gradient)
            return None
        split = SplitBackward(y, x)
        self._weights[microbatch] = split.weight_gradients
        return split.input_gradient(gradient)

    def backward_weights(self, microbatch: int) -> None:
        """The second half of `backward`."""
        if self.splits:
            self._weights.pop(microbatch)()

    def clear(self) -> None:
        """Forget micro-batches whose backward never came."""
        self._kept.clear()
        self._weights.clear()
