"""Count the tokens that each expert processes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Routed


@contextmanager
def counting_experts(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Context manager that yields the number of assignments to each expert, int64 [E] by layer number."""
    counts: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for moe in model.modules():
            if isinstance(moe, MoE):
                counts[moe.index] = torch.zeros(moe.num_experts, dtype=torch.int64)
                hooks.enter_context(moe.router.register_forward_hook(partial(_count, counts[moe.index])))
        yield counts


def _count(counts: Tensor, router: nn.Module, inputs: Any, routed: Routed) -> None:
    counts += routed.experts.flatten().bincount(minlength=len(counts)).cpu()


def shares(counts: dict[int, Tensor]) -> dict[int, list[float]]:
    """Return the counts of each layer as fractions of their sum."""
    return {layer: (count / count.sum()).tolist() for layer, count in counts.items()}
