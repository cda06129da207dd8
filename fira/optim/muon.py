"""Muon for the matrices of the blocks, and AdamW for all other parameters.

    M ← β M + (1 − β) G                        [1] on every rank that holds the matrix
    O = orthogonalized(β M + (1 − β) G)        [2] on one of them; O is sent to the others
    W ← (1 − lr λ) W − lr · 0.2 √max(m, n) O   [3] on every one

G is the gradient of a matrix W [m, n], also of an expert's slice of a tensor [E, m, n], and λ the weight decay. Each
element of O has about the size 1/√max(m, n), so that the update is about as large as that of AdamW, and learning rate
and weight decay have the same values. Sources: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et
al. 2025, arXiv 2502.16982.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fira.optim.adamw import AdamW
from fira.optim.newton_schulz import flops, orthogonalized
from fira.optim.settings import OptimizerSettings
from fira.optim.weight_decay import cautious_decay
from pipeline.divided_work import DividedWork

MOMENTUM = 0.95  # β
RMS = 0.2  # of the elements of an update by AdamW


class Replicated(NamedTuple):
    """The names of matrices, or of stacks of matrices, that are updated by all ranks of a group; None: by this rank."""

    names: list[str]
    group: dist.ProcessGroup | None


class Muon(AdamW):
    """AdamW, except for the parameters in `replicated`, which are updated by Muon and have one moment, M.

    The other arguments are those of AdamW. dtype: of the products on a GPU, None: that of the parameters. Step [2] of a
    matrix is computed by one rank, so the result does not depend on the number of ranks.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decayed: Collection[str],
        settings: OptimizerSettings,
        stacked: Collection[str],
        replicated: Sequence[Replicated],
        dtype: torch.dtype | None = None,
        lr_scales: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        hidden = {name: parameters[name] for names, _ in replicated for name in names}
        others = {name: parameter for name, parameter in parameters.items() if name not in hidden}
        super().__init__(others, decayed, settings, [name for name in stacked if name in others], lr_scales)
        self.moments |= {name: (torch.zeros_like(parameter),) for name, parameter in hidden.items()}
        self._hidden, self._dtype = hidden, dtype
        self._work: list[tuple[list[str], DividedWork]] = []
        for names, group in replicated:
            weights = matrices([hidden[name] for name in names])
            self._work.append((names, DividedWork(weights, [flops(weight.shape) for weight in weights], group)))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter by its `.grad`, which must not be None (collective)."""
        super().step(lr)
        for names, work in self._work:
            self._step_matrices(names, work, lr)

    def _step_matrices(self, names: Sequence[str], work: DividedWork, lr: float) -> None:
        weights = matrices([self._hidden[name] for name in names])
        gradients = matrices([self._hidden[name].grad for name in names])
        averages = matrices([self.moments[name][0] for name in names])
        for average, gradient in zip(averages, gradients, strict=True):
            average.lerp_(gradient, 1 - MOMENTUM)  # [1]

        def update(i: int) -> Tensor:
            return orthogonalized(gradients[i].lerp(averages[i], MOMENTUM), self._dtype or gradients[i].dtype)

        decay = lr * self.settings.weight_decay
        for i, orthogonal in work.results(update):  # [2]
            weight, orthogonal = weights[i], orthogonal.to(weights[i].device)
            if self.settings.cautious_decay:
                weight.sub_(cautious_decay(weight, orthogonal, decay))
            else:
                weight.mul_(1 - decay)
            weight.sub_(orthogonal.mul_(lr * RMS * math.sqrt(max(weight.shape[-2:]))))  # [3]


def matrices(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """The matrices that are computed one by one: on a CPU those of every expert, on a GPU the stack of all of them.

    On a CPU a batched product takes longer, and it may be rounded differently for another number of experts.
    """
    result: list[Tensor] = []
    for tensor in tensors:
        assert tensor is not None
        result += tensor.detach().unbind() if tensor.dim() == 3 and tensor.device.type == "cpu" else [tensor.detach()]
    return result
