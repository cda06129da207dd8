"""Initialisation that does not depend on the layout: each tensor has a generator seeded by its name."""

import hashlib
import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fira.nn.norms import RMSNorm


@runtime_checkable
class OwnInit(Protocol):
    """A module that initialises its own parameters."""

    def init_parameter(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Fill `value`, which has the shape of the parameter `name`."""


class PerExpertInit:
    """Mixin for modules whose parameters have one slice per expert in dim 0. Each slice is drawn by its own name."""

    def init_parameter(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Fill `value`, the slice of one expert."""


class Xavier(nn.Linear):
    """A Linear with Xavier-uniform initial weight (Glorot & Bengio 2010)."""

    def init_parameter(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        fans = (self.in_features + self.out_features) / 2 if name == "weight" else self.in_features
        bound = math.sqrt((3 if name == "weight" else 1) / fans)
        value.uniform_(-bound, bound, generator=generator)


class Normal(nn.Linear):
    """A Linear with initial weight from N(0, 0.02²) and zero bias, as in GPT-2 and Llama."""

    def init_parameter(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        if name == "bias":
            value.zero_()
        else:
            value.normal_(std=0.02, generator=generator)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialise(layer: nn.Module, prefix: str, seed: int, first_expert: int = 0) -> None:
    """Fill a layer's parameters and buffers in place.

    prefix: the layer's global name, `layers.3`. first_expert: the global number of the layer's first local expert.
    """
    for path, module in layer.named_modules(prefix=prefix):
        for tensor, value in initial_values(module, path, seed, first_expert):
            tensor.copy_(value)


def initial_values(module: nn.Module, path: str, seed: int, first_expert: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a module's own parameters and their initial values, and of its buffers and zeros.

    path: the module's global name. Each expert has its own name, so a rank draws only its local experts. Values are
    drawn on the CPU in fp32.
    """
    for name, parameter in module.named_parameters(recurse=False):
        full = f"{path}.{name}"
        value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        if isinstance(module, PerExpertInit):
            for i, expert in enumerate(value):
                module.init_parameter(name, expert, _generator(seed, f"{full}.{first_expert + i}"))
        elif isinstance(module, OwnInit):
            module.init_parameter(name, value, _generator(seed, full))
        else:
            _fill(module, name, value, _generator(seed, full))
        yield parameter, value
    for buffer in module.buffers(recurse=False):
        yield buffer, torch.zeros_like(buffer)


def _fill(module: nn.Module, name: str, value: Tensor, generator: torch.Generator) -> None:
    """Fill with the defaults of torch."""
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | RMSNorm):
        value.fill_(1.0 if name == "weight" else 0.0)
    elif isinstance(module, nn.Embedding):
        value.normal_(generator=generator)
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.in_features)
        value.uniform_(-bound, bound, generator=generator)
    else:
        raise TypeError(f"no initialisation is defined for {type(module).__name__}.{name}")
