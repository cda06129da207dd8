"""Gradients over all ranks: their sum over replicas, their global norm, and scaling."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fira.parallel.parallelize import Distributed, ParamShard
from pipeline.mesh import Mesh

LARGE = 2**20  # bytes of a gradient that is reduced where it lies
BUCKET = 2**22  # bytes of smaller ones reduced together: what a cache still holds when they are copied back


def gradient_of(part: ParamShard) -> Tensor:
    """A part's gradient; every parameter takes part in every step, so there is one after each backward."""
    assert part.parameter.grad is not None, part.name
    return part.parameter.grad


def reduce_gradients(parts: Sequence[ParamShard], mesh: Mesh) -> None:
    """Sum gradients over the replicas: over dp, and for experts over the ranks that hold the same ones.

    The objective is already divided by the tokens of the global batch, so a sum is what is wanted.
    """
    for expert, axis in ((False, "dp"), (True, "edp")):
        group = mesh.groups[axis]
        if dist.get_world_size(group) == 1:
            continue
        gradients = [gradient_of(part) for part in parts if part.expert == expert]
        for gradient in gradients:
            if gradient.nbytes >= LARGE:
                dist.all_reduce(gradient, group=group)
        for bucket in _buckets([gradient for gradient in gradients if gradient.nbytes < LARGE]):
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat, group=group)
            for gradient, reduced in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                gradient.copy_(reduced)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Runs of tensors on one device of about BUCKET bytes."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not buckets or size >= BUCKET or tensor.device != buckets[-1][0].device:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.nbytes
    return buckets


class NormVector:
    """Where each parameter's squared gradient norm stands in one vector over the whole model.

    One entry a parameter, and one an expert for experts' parameters. Each entry is computed by one rank, in float64,
    and the sum over ranks only adds zeros to it; so the norm has the same bits wherever the entries were computed.
    """

    def __init__(self, model: Distributed, mesh: Mesh) -> None:
        self.names: list[str] = []
        self._mine: list[tuple[ParamShard, int]] = []
        places: list[int] = []
        held = {part.name: part for part in model.parts}
        for name, shape, expert in model.parameters:
            part = held.get(name)
            if part is not None and (mesh.edp_rank if expert else mesh.dp_rank) == 0:
                rows = len(part.parameter) if expert else 1
                self._mine.append((part, rows))
                places += range(len(self.names) + part.start, len(self.names) + part.start + rows)
            self.names += [f"{name}[{e}]" for e in range(shape[0])] if expert else [name]
        self._places = torch.tensor(places, device=model.device)

    def local(self) -> Tensor:
        """The vector with this rank's entries, the rest zero: [len(names)] float64."""
        vector = torch.zeros(len(self.names), dtype=torch.float64, device=self._places.device)
        norms = [
            torch.linalg.vector_norm(gradient_of(part).reshape(rows, -1), dim=1, dtype=torch.float64).to(vector.device)
            for part, rows in self._mine
        ]
        if norms:
            vector[self._places] = torch.cat(norms).square()
        return vector


def scale_gradients(parts: Sequence[ParamShard], factor: float) -> None:
    """Multiply all gradients, for clipping and for unscaling."""
    if factor != 1.0:
        torch._foreach_mul_([gradient_of(part) for part in parts], factor)
