"""The global norm of the gradients, and their scaling."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fira.parallel.owners import Owners
from fira.parallel.parallelize import DistributedModel
from fira.parallel.param_shard import ParamShard


def gradient_of(shard: ParamShard) -> Tensor:
    """The gradient of a shard. Every parameter is used in every step, so the gradient exists after each backward."""
    assert shard.parameter.grad is not None, shard.name
    return shard.parameter.grad


class NormVector:
    """Squared gradient norms of all parameters of the model, as one vector with a fixed order.

    There is one entry per parameter, and one per expert for experts' parameters. Exactly one rank owns an entry and
    computes it in float64; in the vectors of all other ranks it is zero. The global norm, the square root of the sum
    of all entries, is therefore bitwise identical for all layouts in which the gradients are bitwise identical.
    """

    def __init__(self, model: DistributedModel, owners: Owners) -> None:
        self.names: list[str] = []  # of the entries
        self._owned: list[ParamShard] = []
        indices: list[int] = []  # of this rank's entries
        shards = {shard.name: shard for shard in model.shards}
        for name, shape, expert in model.parameters:
            shard = shards.get(name)
            if shard is not None and owners.owns(shard):
                rows = len(shard.parameter) if expert else 1
                self._owned.append(shard)
                indices += range(len(self.names) + shard.start, len(self.names) + shard.start + rows)
            self.names += [f"{name}[{e}]" for e in range(shape[0])] if expert else [name]
        self._indices = torch.tensor(indices, device=model.device)

    def local(self) -> Tensor:
        """This rank's entries in a vector of zeros: [len(names)] float64."""
        vector = torch.zeros(len(self.names), dtype=torch.float64, device=self._indices.device)
        gradients: list[Tensor] = []
        for shard in self._owned:
            gradients += gradient_of(shard).unbind() if shard.expert else [gradient_of(shard)]
        if gradients:
            norms = torch._foreach_norm(gradients, dtype=torch.float64)
            vector[self._indices] = torch.stack([norm.to(vector.device) for norm in norms]).square()
        return vector


def scale_gradients(shards: Sequence[ParamShard], factor: float) -> None:
    """Multiply all gradients in place, for clipping and for unscaling."""
    if factor != 1.0 and shards:
        torch._foreach_mul_([gradient_of(shard) for shard in shards], factor)
