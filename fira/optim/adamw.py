"""AdamW over a rank's parameters."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with β 0.9 and 0.95, by torch's fused kernel.

    parameters: by name. decayed: the names of those to which weight decay applies. moments: [name] → exp_avg and
    exp_avg_sq, each of the parameter's shape. updates: the number of steps taken. This is not a torch.optim.Optimizer,
    because the first use of that class imports torch's compiler, which takes 2 s on every rank at every start.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decayed: Collection[str], weight_decay: float) -> None:
        self.updates = 0
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
        self._parameters = parameters
        others = [name for name in parameters if name not in decayed]
        self._groups = [([name for name in parameters if name in decayed], weight_decay), (others, 0.0)]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter by its `.grad`, which must not be None."""
        for names, weight_decay in self._groups:
            if not names:
                continue
            parameters = [self._parameters[name] for name in names]
            gradients = [p.grad for p in parameters if p.grad is not None]
            exp_avg, exp_avg_sq = zip(*(self.moments[name] for name in names), strict=True)
            adamw(
                parameters,
                gradients,
                list(exp_avg),
                list(exp_avg_sq),
                [],
                [torch.full((), float(self.updates), device=p.device) for p in parameters],
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.95,
                lr=lr,
                weight_decay=weight_decay,
                eps=1e-8,
                maximize=False,
            )
        self.updates += 1
