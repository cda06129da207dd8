"""AdamW over this rank's parts of the model, with gradients, norm and clipping that are global."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim.adamw import adamw

from fira.parallelize import Distributed, Part
from pipeline.mesh import Mesh

LARGE = 2**20  # bytes of a gradient that is reduced where it lies
BUCKET = 2**22  # bytes of smaller ones reduced together: what a cache still holds when they are copied back


def learning_rate(step: int, steps: int, peak: float, low: float, warmup: int) -> float:
    """Linear from 0 to `peak` over the first `warmup` steps, then a half cosine down to `low` at the last step.

    step counts from 1. Loshchilov & Hutter 2016 (arXiv 1608.03983).
    """
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def gradient_of(part: Part) -> Tensor:
    """A part's gradient; every parameter takes part in every step, so there is one after each backward."""
    assert part.parameter.grad is not None, part.name
    return part.parameter.grad


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with β 0.9 / 0.95, by torch's fused kernel.

    Matrices decay; vectors (norms and biases, also each expert's) do not. moments: [parameter name] → exp_avg and
    exp_avg_sq, shaped like the part. Not a torch.optim.Optimizer, whose first use imports torch's compiler: two seconds
    on every rank at every start.
    """

    def __init__(self, parts: Sequence[Part], weight_decay: float) -> None:
        self.updates = 0
        self.moments = {
            part.name: (torch.zeros_like(part.parameter), torch.zeros_like(part.parameter)) for part in parts
        }
        decayed = [part for part in parts if len(part.shape) - part.expert >= 2]
        others = [part for part in parts if len(part.shape) - part.expert < 2]
        self._groups = [(decayed, weight_decay), (others, 0.0)]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter by its `.grad`."""
        for parts, weight_decay in self._groups:
            if not parts:
                continue
            first, second = zip(*(self.moments[part.name] for part in parts), strict=True)
            adamw(
                [part.parameter for part in parts],
                [gradient_of(part) for part in parts],
                list(first),
                list(second),
                [],
                [torch.full((), float(self.updates), device=part.parameter.device) for part in parts],
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


def reduce_gradients(parts: Sequence[Part], mesh: Mesh) -> None:
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
        self._mine: list[tuple[Part, int]] = []
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


def scale_gradients(parts: Sequence[Part], factor: float) -> None:
    """Multiply all gradients, for clipping and for unscaling."""
    if factor != 1.0:
        torch._foreach_mul_([gradient_of(part) for part in parts], factor)


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2017, arXiv 1710.03740): halved on overflow."""

    GROWTH_INTERVAL = 1000

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = 2.0**15 if enabled else 1.0
        self.good_steps = 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up a saved scale; a run that does not scale ignores it."""
        if self.enabled and state["value"] > 1:
            self.value, self.good_steps = state["value"], int(state["good_steps"])

    def update(self, overflow: bool) -> None:
        """After a step: whether its gradients overflowed."""
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value /= 2
        elif self.good_steps % self.GROWTH_INTERVAL == 0:
            self.value *= 2
