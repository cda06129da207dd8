"""One optimizer step and one validation over all ranks. Everything that ranks tell each other in a step is here."""

import functools
import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fira.data.loader import Loader, ValidationSequences
from fira.data.mixture import Joined, Mixture
from fira.errors import UserError
from fira.nn.context import MoEStats
from fira.optim.adamw import AdamW
from fira.optim.loss_scale import LossScale
from fira.parallel.batch_split import BatchSplit
from fira.parallel.gradients import NormVector, reduce_gradients, scale_gradients
from fira.parallel.parallelize import DistributedModel
from pipeline.engine import MicroBatch
from pipeline.mesh import Mesh
from pipeline.schedule import SCHEDULES, forward_only


@dataclass(frozen=True)
class StepResult:
    """What a step was, the same on all ranks. signals: how many ranks raised each of the flags given to `step`."""

    loss: float  # nats per token over the global batch, without the auxiliary loss
    aux_loss: float
    grad_norm: float  # before clipping
    expert_load: list[list[float]]  # fraction of assignments, [MoE layer][expert]
    expert_dropped: list[list[float]]  # fraction of its own assignments that it did not take, [MoE layer][expert]
    dropped: float | None  # fraction of all assignments that no expert took; None without experts
    router_entropy: list[float]  # nats, mean over tokens, [MoE layer]
    bubble: float  # fraction of the step that ranks waited for one another in the pipeline
    skipped: bool  # fp16 overflow: no update was made
    signals: list[int]


class Trainer:
    """A model under training. step and evaluate are collective; their results do not depend on the layout."""

    def __init__(
        self,
        model: DistributedModel,
        mesh: Mesh,
        split: BatchSplit,
        schedule: str,
        weight_decay: float,
        clip: float,
        fp16: bool,
    ) -> None:
        self.model = model
        self.mesh = mesh
        self.split = split
        self.schedule = functools.cache(SCHEDULES[schedule].builder)
        self.clip = clip
        self.optimizer = AdamW(
            {part.name: part.parameter for part in model.shards},
            {part.name for part in model.shards if part.is_matrix},
            weight_decay,
        )
        self.scale = LossScale(fp16)
        self.norms = NormVector(model, mesh)

    def step(self, loader: Loader | Mixture, sequences: int, lr: float, seed: int, flags: list[bool]) -> StepResult:
        """Train on the loader's next sequences. Raises UserError, on all ranks and before any weight has changed, where
        loss or gradients are not finite."""
        started = time.perf_counter()
        scale = self.scale.value
        first = loader.consumed
        microbatches = self.split.microbatches(loader.batch, first, sequences, seed, scale)
        loader.consumed += sequences
        tokens = sequences * microbatches[0].inputs.shape[1]

        for part in self.model.shards:
            part.parameter.grad = None
        schedule = self.schedule(self.mesh.layout.pp, len(microbatches))
        losses = self.model.engine.run(schedule, microbatches)
        if self.model.tied:
            self.model.tied.sum_gradients()
        reduce_gradients(self.model.shards, self.mesh)

        waited = self.model.engine.waited / (time.perf_counter() - started) / self.mesh.layout.world
        of_experts = self._experts([batch.context.training.stats for batch in microbatches])
        own = torch.tensor([waited, *flags], dtype=torch.float64, device=self.model.device)
        sums = _sum_over_ranks(self.norms.local(), *of_experts, _total(losses, self.model.device), own)
        norms, load, dropped, entropy, aux, total, own = sums
        loss, aux_loss, (bubble, *signals) = float(total), float(aux), own.tolist()
        norm = math.sqrt(float(norms.sum())) / scale

        overflow = self.scale.enabled and not math.isfinite(norm)
        self._check_finite(loss / tokens, norms, overflow)
        self.scale.update(overflow)
        if not overflow:
            clipping = min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0
            scale_gradients(self.model.shards, clipping / scale)
            self.optimizer.step(lr)
            if self.model.tied:
                self.model.tied.share_value()
            for moe in self.model.moe:
                moe.router.rebalance(load[self.model.moe_layers.index(moe.index)])
        return StepResult(
            loss=loss / tokens,
            aux_loss=aux_loss / scale,
            grad_norm=norm,
            expert_load=(load / load.sum(1, keepdim=True)).tolist(),
            expert_dropped=(dropped / load.clamp(min=1)).tolist(),
            dropped=float(dropped.sum() / load.sum()) if len(load) else None,
            router_entropy=(entropy / tokens).tolist(),
            bubble=bubble,
            skipped=overflow,
            signals=[round(s) for s in signals],
        )

    def evaluate(self, data: ValidationSequences | Joined, batch: int) -> float:
        """Mean loss, in nats per token, over all of the data, `batch` sequences at a time."""
        total = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(data), batch):
            count = min(batch, len(data) - first)
            microbatches = self.split.microbatches(data.batch, first, count, dropout_seed=None)
            schedule = forward_only(self.model.placement, len(microbatches))
            losses = self.model.engine.run(schedule, microbatches)
            total[0] += float(_total(losses, self.model.device))
            total[1] += _targets(microbatches) if losses else 0
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _experts(self, stats: list[dict[tuple[int, int], MoEStats]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What became of this rank's tokens: assignments and how many of them were dropped, both [MoE layers of the
        model, experts], the routers' entropy summed over tokens [MoE layers], and the auxiliary loss []."""
        layers, device = len(self.model.moe_layers), self.model.device
        load, dropped = torch.zeros(2, layers, self.model.num_experts, dtype=torch.float64, device=device)
        entropy, aux = torch.zeros(layers, dtype=torch.float64, device=device), load.new_zeros(())
        for microbatch in stats:
            for (layer, _), one in sorted(microbatch.items()):
                place = self.model.moe_layers.index(layer)
                load[place] += one.load.to(device)
                dropped[place] += one.dropped.to(device)
                entropy[place] += one.entropy.to(device)
                aux += one.aux.to(device)
        return load, dropped, entropy, aux

    def _check_finite(self, loss: float, norms: Tensor, overflow: bool) -> None:
        if math.isfinite(loss) and (overflow or bool(norms.isfinite().all())):
            if self.scale.enabled and self.scale.value < 2**-14:
                raise UserError(
                    "fp16 gradients overflow at every loss scale; use --precision bf16 or fp32, or a lower --lr"
                )
            return
        bad = [name for name, norm in zip(self.norms.names, norms.tolist(), strict=True) if not math.isfinite(norm)]
        cause = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
        where = f", first gradient not finite: {bad[0]} ({len(bad)} of {len(norms)})" if bad else ""
        raise UserError(
            f"{cause}{where}; no weight was changed: resume from the last checkpoint with a lower --lr or --clip"
        )


def _total(losses: list[Tensor], device: torch.device) -> Tensor:
    """[] float64 on the device; zero without losses."""
    if not losses:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(losses).double().sum().to(device)


def _targets(microbatches: list[MicroBatch]) -> int:
    return int(sum(batch.context.lengths.sum() for batch in microbatches))


def _sum_over_ranks(*tensors: Tensor) -> list[Tensor]:
    """Sum several float64 tensors over all ranks in one collective; the sums are on the CPU.

    This is the one place of a step where a rank waits for its device, and for all other ranks.
    """
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    dist.all_reduce(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]
