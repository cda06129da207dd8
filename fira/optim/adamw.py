"""AdamW over a rank's parameters."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

VECTOR = 64  # bytes of the largest vector register of a CPU


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with β 0.9 and 0.95, by torch's fused kernel.

    parameters: by name. decayed: the names of those to which weight decay applies. stacked: the names of those whose
    rows are parameters of their own, such as experts. moments: [name] → exp_avg and exp_avg_sq, each of the parameter's
    shape. updates: the number of steps taken. This is not a torch.optim.Optimizer, because the first use of that class
    imports torch's compiler, which takes 2 s on every rank at every start.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decayed: Collection[str],
        weight_decay: float,
        stacked: Collection[str] = (),
    ) -> None:
        self.updates = 0
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
        self._parameters = parameters
        # The kernel may round the last elements of a tensor, which do not fill a vector, differently from the others.
        # Rows that fill vectors are updated together.
        self._by_row = {name for name in stacked if parameters[name][0].nbytes % VECTOR}
        others = [name for name in parameters if name not in decayed]
        self._groups = [([name for name in parameters if name in decayed], weight_decay), (others, 0.0)]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter by its `.grad`, which must not be None."""
        for names, weight_decay in self._groups:
            if not names:
                continue
            parameters = self._tensors({name: self._parameters[name] for name in names})
            gradients = self._tensors({name: self._parameters[name].grad for name in names})
            adamw(
                parameters,
                gradients,
                self._tensors({name: self.moments[name][0] for name in names}),
                self._tensors({name: self.moments[name][1] for name in names}),
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

    def _tensors(self, by_name: Mapping[str, Tensor | None]) -> list[Tensor]:
        """The tensors that the kernel updates, which are rows for some of the stacked parameters."""
        result: list[Tensor] = []
        for name, tensor in by_name.items():
            assert tensor is not None, name
            result += tensor.unbind() if name in self._by_row else [tensor]
        return result
