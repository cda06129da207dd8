"""AdamW over a rank's parameters."""

from collections.abc import Collection, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fira.optim.settings import OptimizerSettings
from fira.optim.weight_decay import cautious_decay

VECTOR = 64  # bytes of the largest vector register of a CPU


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), by torch's fused kernel.

    parameters: by name. decayed: the names of those to which weight decay applies. stacked: the names of those whose
    rows are parameters of their own, such as experts. lr_scales: factors of the learning rate by name; without an entry
    it is 1. moments: [name] → exp_avg and exp_avg_sq, each of the parameter's shape. updates: the number of steps
    taken. This is not a torch.optim.Optimizer, because the first use of that class imports torch's compiler, which
    takes 2 s on every rank at every start.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decayed: Collection[str],
        settings: OptimizerSettings,
        stacked: Collection[str] = (),
        lr_scales: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.updates = 0
        self.moments: dict[str, tuple[Tensor, ...]] = {
            name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()
        }
        self.settings = settings
        self._parameters = parameters
        # The kernel may round the last elements of a tensor, which do not fill a vector, differently from the others.
        # Rows that fill vectors are updated together.
        self._by_row = {name for name in stacked if parameters[name][0].nbytes % VECTOR}
        # Names by weight decay, factor of the learning rate, and device.
        self._groups: dict[tuple[float, float, torch.device], list[str]] = {}
        for name, parameter in parameters.items():
            decay = settings.weight_decay if name in decayed else 0.0
            self._groups.setdefault((decay, lr_scales.get(name, 1.0), parameter.device), []).append(name)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter by its `.grad`, which must not be None."""
        settings = self.settings
        self.updates += 1
        for (weight_decay, scale, device), names in self._groups.items():
            parameters = self._tensors({name: self._parameters[name] for name in names})
            gradients = self._tensors({name: self._parameters[name].grad for name in names})
            averages = self._tensors({name: self.moments[name][0] for name in names})
            is_cautious = settings.cautious_decay and weight_decay > 0
            before = [parameter.clone() for parameter in parameters] if is_cautious else []
            # Not torch's function `adamw`: it would need one counter of steps for each tensor.
            torch._fused_adamw_(
                parameters,
                gradients,
                averages,
                self._tensors({name: self.moments[name][1] for name in names}),
                [],
                [torch.full((), float(self.updates), device=device)] * len(parameters),
                amsgrad=False,
                beta1=settings.beta1,
                beta2=settings.beta2,
                lr=lr * scale,
                weight_decay=0.0 if is_cautious else weight_decay,
                eps=settings.eps,
                maximize=False,
            )
            for parameter, weight, average in zip(parameters, before, averages, strict=False):
                # The update has the sign of the average.
                parameter.sub_(cautious_decay(weight, average, lr * scale * weight_decay))

    def _tensors(self, by_name: Mapping[str, Tensor | None]) -> list[Tensor]:
        """The tensors that the kernel updates, which are rows for some of the stacked parameters."""
        result: list[Tensor] = []
        for name, tensor in by_name.items():
            assert tensor is not None, name
            result += tensor.unbind() if name in self._by_row else [tensor]
        return result
