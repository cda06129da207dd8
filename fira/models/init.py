"""Initial weights that do not depend on the layout: every tensor is drawn from a generator seeded by its name."""

import hashlib
import math

import torch
from torch import Tensor, nn

from fira.models.moe import Experts


class Xavier(nn.Linear):
    """A Linear whose weight starts xavier-uniform (Glorot & Bengio 2010)."""


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialise(layer: nn.Module, prefix: str, seed: int, first_expert: int = 0) -> None:
    """Fill a layer's parameters in place, as its module types say.

    prefix: the layer's global name, `layers.3`. first_expert: the global number of the layer's first local expert;
    each expert is drawn by its own name, so a rank draws only those it holds. Drawing happens on the CPU in fp32.
    """
    for path, module in layer.named_modules(prefix=prefix):
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            value = torch.empty(parameter.shape)
            if isinstance(module, Experts):
                for i, one in enumerate(value):
                    module.init_parameter(name, one, _generator(seed, f"{full}.{first_expert + i}"))
            else:
                _fill(module, name, value, _generator(seed, full))
            parameter.copy_(value)


def _fill(module: nn.Module, name: str, value: Tensor, generator: torch.Generator) -> None:
    """torch's defaults, and xavier-uniform for the Linears that ask for it."""
    if isinstance(module, nn.LayerNorm):
        value.fill_(1.0 if name == "weight" else 0.0)
    elif isinstance(module, nn.Embedding):
        value.normal_(generator=generator)
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.in_features)
        if name == "weight" and isinstance(module, Xavier):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
        value.uniform_(-bound, bound, generator=generator)
    else:
        raise TypeError(f"no rule says how {type(module).__name__}.{name} starts")
