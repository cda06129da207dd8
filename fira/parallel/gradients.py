"""Gradients over all ranks: their sum over replicas, their global norm, and scaling."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fira.parallel.parallelize import DistributedModel, ParamShard
from pipeline.mesh import Mesh

UNBUCKETED = 2**20  # bytes from which a gradient is reduced in place, without a bucket
BUCKET = 2**22  # bytes of a bucket of smaller gradients, small enough to stay in the CPU cache until copied back


def gradient_of(shard: ParamShard) -> Tensor:
    """The gradient of a shard. Every parameter is used in every step, so the gradient exists after each backward."""
    assert shard.parameter.grad is not None, shard.name
    return shard.parameter.grad


def reduce_gradients(shards: Sequence[ParamShard], mesh: Mesh) -> None:
    """Sum gradients over the replicas: over dp, and for experts over edp, the ranks that hold the same experts.

    The result is a sum, not a mean, because the objective is already divided by the tokens of the global batch.
    """
    for expert, axis in ((False, "dp"), (True, "edp")):
        group = mesh.groups[axis]
        if dist.get_world_size(group) == 1:
            continue
        gradients = [gradient_of(shard) for shard in shards if shard.expert == expert]
        for gradient in gradients:
            if gradient.nbytes >= UNBUCKETED:
                dist.all_reduce(gradient, group=group)
        for bucket in _buckets([gradient for gradient in gradients if gradient.nbytes < UNBUCKETED]):
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat, group=group)
            for gradient, reduced in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                gradient.copy_(reduced)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group consecutive tensors on one device; a group is complete when it has at least BUCKET bytes."""
    buckets: list[list[Tensor]] = []
    size = BUCKET  # the first tensor starts a group
    for tensor in tensors:
        if size >= BUCKET or tensor.device != buckets[-1][0].device:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.nbytes
    return buckets


class NormVector:
    """Squared gradient norms of all parameters of the model, as one vector with a fixed order.

    There is one entry per parameter, and one per expert for experts' parameters. Exactly one rank owns an entry and
    computes it in float64; in the vectors of all other ranks it is zero. The global norm, the square root of the sum
    of all entries, is therefore bitwise identical for all layouts in which the gradients are bitwise identical.
    """

    def __init__(self, model: DistributedModel, mesh: Mesh) -> None:
        self.names: list[str] = []  # of the entries
        self._owned: list[tuple[ParamShard, int]] = []  # with the number of entries of each shard
        indices: list[int] = []  # of this rank's entries
        shards = {shard.name: shard for shard in model.shards}
        for name, shape, expert in model.parameters:
            shard = shards.get(name)
            if shard is not None and (mesh.edp_rank if expert else mesh.dp_rank) == 0:
                rows = len(shard.parameter) if expert else 1
                self._owned.append((shard, rows))
                indices += range(len(self.names) + shard.start, len(self.names) + shard.start + rows)
            self.names += [f"{name}[{e}]" for e in range(shape[0])] if expert else [name]
        self._indices = torch.tensor(indices, device=model.device)

    def local(self) -> Tensor:
        """This rank's entries in a vector of zeros: [len(names)] float64."""
        vector = torch.zeros(len(self.names), dtype=torch.float64, device=self._indices.device)
        norms = []
        for shard, rows in self._owned:
            gradients = gradient_of(shard).reshape(rows, -1)
            norms.append(torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64).to(vector.device))
        if norms:
            vector[self._indices] = torch.cat(norms).square()
        return vector


def scale_gradients(shards: Sequence[ParamShard], factor: float) -> None:
    """Multiply all gradients in place, for clipping and for unscaling."""
    if factor != 1.0:
        torch._foreach_mul_([gradient_of(shard) for shard in shards], factor)
