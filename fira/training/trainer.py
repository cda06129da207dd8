"""One optimizer step on all ranks."""

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from fira.checkpoint.ranks import gather
from fira.data.loader import TrainingBatches
from fira.errors import UserError
from fira.nn.context import MoEStats, pinned_for
from fira.optim.loss_scale import LossScale
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.cast_weights import cast_weights
from fira.parallel.forward_pass import ForwardPass, by_number
from fira.parallel.gradient_sum import GradientSum
from fira.parallel.gradients import NormVector, scale_gradients
from fira.parallel.kernel_loading import KernelLoading
from fira.parallel.overlapped_reduction import OverlappedReduction
from fira.parallel.owners import Owners
from fira.parallel.parallelize import DistributedModel
from fira.parallel.param_shard import ParamShard
from fira.parallel.rank_optimizer import make_optimizer
from fira.parallel.sharded_gradient_sum import ShardedGradientSum
from fira.training.numerical_faults import FaultHistory, NumericalFault
from pipeline.engine import MicroBatch
from pipeline.mesh import Mesh
from pipeline.schedule import SCHEDULES


@dataclass(frozen=True)
class StepResult:
    """Results of a step, the same on all ranks."""

    loss: float  # mean over the terms of the objective in the global batch, without the auxiliary loss
    metrics: dict[str, float]  # of the objective, by name
    aux_loss: float
    grad_norm: float  # before clipping
    expert_load: list[list[float]]  # fraction of the layer's assignments, [MoE layer][expert]
    expert_dropped: list[list[float]]  # dropped fraction of the expert's own assignments, [MoE layer][expert]
    dropped: float | None  # dropped fraction of all assignments; None without experts
    router_entropy: list[float]  # nats, mean over tokens, [MoE layer]
    bubble: float  # fraction of the step in which ranks waited in the pipeline, mean over ranks
    skipped: bool  # no update because fp16 gradients overflowed
    extra: list[float]  # argument `extra` of `step`, summed over ranks


@dataclass(frozen=True)
class StepSums:
    """Contributions of one rank to the results of a step, or their sums over all ranks; float64.

    Sums over ranks are exact, because they are sums of integers, or one rank has the number and the others have zero.
    `bubble` and `extra` are the exceptions.
    """

    norms: Tensor  # [entries of NormVector] squared gradient norms
    load: Tensor  # [MoE layers, experts] assignments
    dropped: Tensor  # [MoE layers, experts] dropped assignments
    entropy: Tensor  # [MoE layers, micro-batches] router entropy in nats, summed over tokens
    aux_loss: Tensor  # [MoE layers, micro-batches] auxiliary loss times the loss scale
    reports: Tensor  # [1 + metrics, micro-batches] loss and metrics, summed over the terms of the objective
    bubble: Tensor  # [] fraction of the step in which this rank waited, divided by the number of ranks
    extra: Tensor  # [n] argument `extra` of `step`

    def all_reduce(self) -> "StepSums":
        """Sums over all ranks, on the CPU, in one collective.

        This is the only point of a step at which a rank waits for its device and for all other ranks.
        """
        tensors = [getattr(self, field.name) for field in fields(self)]
        flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
        dist.all_reduce(flat)
        sums = flat.split([tensor.numel() for tensor in tensors])
        return StepSums(*(part.view_as(tensor) for part, tensor in zip(sums, tensors, strict=True)))


class Trainer:
    """A model in training. `step` is collective, and its results do not depend on the layout."""

    def __init__(
        self,
        model: DistributedModel,
        mesh: Mesh,
        split: BatchSplit,
        schedule: str,
        optimizer: OptimizerSettings,
        clip: float,
        fp16: bool,
    ) -> None:
        self.model = model
        self.mesh = mesh
        self.split = replace(split, alternating=bool(model.weights))
        self.schedule = functools.cache(SCHEDULES[schedule].builder)
        self.clip = clip
        self.owners = Owners(model, mesh)
        self.optimizer = make_optimizer(model, self.owners, optimizer)
        self.scale = LossScale(fp16)
        self.history = FaultHistory()
        self.norms = NormVector(model, self.owners)
        # By the device and not the backend: where GPUs use MPI, experts compute the rows of all ranks together as well.
        self.reduction: GradientSum | OverlappedReduction | ShardedGradientSum
        if model.weights:
            self.reduction = ShardedGradientSum(model, mesh)
        elif mesh.device_type == "cpu":
            self.reduction = GradientSum(model, mesh, self.owners)
        else:
            self.reduction = OverlappedReduction(model, mesh)
        self.kernels = KernelLoading(model, mesh)
        self.forward = ForwardPass(model, self.split, self.kernels)

    def step(
        self, loader: TrainingBatches, sequences: int, lr: float, seed: int, extra: Sequence[float] = ()
    ) -> StepResult:
        """Train on the next `sequences` sequences of the loader.

        extra: numbers to sum over all ranks in the collective that reduces the results.
        Raises NumericalFault on all ranks, before any weight has changed, if the loss or a gradient is not finite, or
        if `history` finds a spike.
        """
        started = time.perf_counter()
        scale = self.scale.value
        batch = self.split.batch(loader.batch, loader.consumed, sequences, seed, scale)
        loader.consumed += sequences

        reports = self._backward(batch.microbatches, self.split.total(sequences))
        waited = self.model.engine.waited()  # on CUDA, this waits for the device
        bubble = waited / (time.perf_counter() - started) / self.mesh.layout.world
        sums = self._step_sums(sequences, batch.microbatches, reports, bubble, extra).all_reduce()
        loss, *metrics = (value / max(1, batch.terms) for value in sums.reports.sum(1).tolist())
        norm = math.sqrt(float(sums.norms.sum())) / scale

        overflow = self.scale.enabled and not math.isfinite(norm)
        self._check_finite(loss, sums.norms, overflow)
        self.history.add(loss)
        self.scale.update(overflow)
        if not overflow:
            self._update(lr, norm, scale, sums.load)
        return StepResult(
            loss=loss,
            metrics=dict(zip(self.split.objective.metrics, metrics, strict=True)),
            aux_loss=float(sums.aux_loss.sum()) / scale,
            grad_norm=norm,
            expert_load=(sums.load / sums.load.sum(1, keepdim=True)).tolist(),
            expert_dropped=(sums.dropped / sums.load.clamp(min=1)).tolist(),
            dropped=float(sums.dropped.sum() / sums.load.sum()) if len(sums.load) else None,
            router_entropy=(sums.entropy.sum(1) / max(1, batch.tokens)).tolist(),
            bubble=float(sums.bubble),
            skipped=overflow,
            extra=sums.extra.tolist(),
        )

    def _backward(self, microbatches: list[MicroBatch], total: int) -> list[Tensor]:
        """Run forward and backward, sum the gradients, and return the reports of this rank's micro-batches.

        total: number of micro-batches of the global batch.
        """
        schedule = self.schedule(self.mesh.layout.pp, len(microbatches))
        with cast_weights(self.model.modules(), self.model.cast_copies):
            self.kernels.load(microbatches[0], training=True)
            self.reduction.begin(total)
            reports = self.model.engine.run(schedule, microbatches, self.reduction.around_backward)
        self.reduction.finish()
        return reports

    def _update(self, lr: float, norm: float, scale: float, load: Tensor) -> None:
        """Clip and unscale the gradients, update the weights, and rebalance routers by the load of the experts."""
        clipping = min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0
        scale_gradients(self.owners.updated, clipping / scale)
        self.optimizer.step(lr)
        self.owners.share_weights()
        if self.model.tied:
            self.model.tied.share_value()
        for moe in self.model.moe:
            moe.router.rebalance(load[self.model.moe_layers.index(moe.index)])

    def _step_sums(
        self,
        sequences: int,
        microbatches: list[MicroBatch],
        reports: list[Tensor],
        bubble: float,
        extra: Sequence[float],
    ) -> StepSums:
        """Contributions of this rank, on its device."""
        layers, device = len(self.model.moe_layers), self.model.device
        load, dropped = torch.zeros(2, layers, self.model.num_experts, dtype=torch.float64, device=device)
        entropy, aux_loss = load.new_zeros(2, layers, self.split.total(sequences))
        numbers = self.split.numbers(sequences)
        stats = [microbatch.context.training.stats for microbatch in microbatches[: len(numbers)]]
        if stats and stats[0]:
            span = slice(numbers.start, numbers.stop, numbers.step)
            for layer, routing in _by_layer(stats, device).items():
                row = self.model.moe_layers.index(layer)
                load[row], dropped[row] = routing.load.sum(0), routing.dropped.sum(0)
                entropy[row, span], aux_loss[row, span] = routing.entropy, routing.aux
        return StepSums(
            norms=self.norms.local(),
            load=load,
            dropped=dropped,
            entropy=entropy,
            aux_loss=aux_loss,
            reports=by_number(reports, self.split, sequences, microbatches[0].inputs.shape[1], device).T.contiguous(),
            bubble=load.new_full((), bubble),  # new_tensor would wait for the device
            extra=pinned_for(device, torch.tensor(extra, dtype=load.dtype)).to(device, non_blocking=True),
        )

    def _check_finite(self, loss: float, norms: Tensor, overflow: bool) -> None:
        """Raise if the loss or a gradient is not finite, except for fp16 gradients at a high loss scale."""
        if math.isfinite(loss) and (overflow or bool(norms.isfinite().all())):
            if self.scale.enabled and self.scale.value < 2**-14:
                raise UserError(
                    "fp16 gradients overflow at every loss scale; use --precision bf16 or fp32, or a lower --lr"
                )
            return
        bad = [name for name, norm in zip(self.norms.names, norms.tolist(), strict=True) if not math.isfinite(norm)]
        cause = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
        where = f", first gradient not finite: {bad[0]} ({len(bad)} of {len(norms)})" if bad else ""
        kept = (shard for shard in (*self.model.shards, *self.model.buffers) if shard.kept)
        local = next(filter(None, map(_not_finite, kept)), None)
        broken = next((f"{name} is not finite since an earlier step" for name in gather(local) if name), None)
        advice = "resume from an earlier checkpoint with a lower --lr or --clip and --override"
        raise NumericalFault(f"{cause}{where}; {broken or 'this step changed no weight'}; {advice}")


def _by_layer(stats: Sequence[dict[tuple[int, int], MoEStats]], device: torch.device) -> dict[int, MoEStats]:
    """The statistics of several micro-batches, which have the same layers and chunks, in float64 [micro-batches, …].

    They are stacked for all layers at once: an operation for each of them would take longer than the statistics.
    """
    keys = sorted(stats[0])
    layers = sorted({layer for layer, _ in keys})
    shape = len(layers), len(keys) // len(layers), len(stats)

    def stacked(name: str) -> Sequence[Tensor]:
        values = [getattr(parts[key], name).to(device) for key in keys for parts in stats]
        return torch.stack(values).double().unflatten(0, shape).sum(1).unbind()

    columns = (stacked(field.name) for field in fields(MoEStats))
    return {layer: MoEStats(*values) for layer, *values in zip(layers, *columns, strict=True)}


def _not_finite(shard: ParamShard) -> str | None:
    """The name of a shard if it has a number that is not finite, with the index of the first expert that has one."""
    finite = shard.parameter.isfinite()
    if finite.all():
        return None
    row = int(finite.reshape(len(finite), -1).all(1).logical_not().nonzero()[0])
    return f"{shard.name}[{shard.start + row}]" if shard.expert else shard.name
