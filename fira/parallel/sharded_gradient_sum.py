"""Sum the gradients of parameters that the replicas divide, on their owners, after each use of a layer.

    gradients of micro-batch i, of the layer that this rank has just released
      [1] send each to its owner          from every replica a leaf of the tree (pipeline/tree_sum.py)
      [2] the owner adds the leaves       the tree of each bucket
    end of the step
      [3] own parameters                  .grad, the gradient of the global batch
      [4]                                 the gradient of a tied embedding is added

No rank has the gradients of more than one layer, except for those of its own parameters. The replicas compute
alternating micro-batches (`BatchSplit`), so that the leaves of [1] are consecutive: they add up to one node of the
tree, and an owner stores about log₂ n nodes of n micro-batches per replica.

A backward in two parts (zero bubble) sends the gradients after its second part.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from fira.parallel.gradient_sum import BUCKET, sum_parts
from fira.parallel.parallelize import DistributedModel
from fira.parallel.param_shard import AXES
from pipeline.mesh import Mesh
from pipeline.schedule import Action, ActionKind
from pipeline.tree_sum import TreeSum


class ShardedGradientSum:
    """Has the methods of `GradientSum`, for a model with `weights`. Only the owner of a parameter gets its gradient."""

    def __init__(self, model: DistributedModel, mesh: Mesh) -> None:
        self._stages, self._mesh, self._tied = model.stages, mesh, model.tied
        self._action: Action | None = None
        self._layers: dict[int, list[_LayerGradients]] = {}
        for layer, weights in model.weights.items():
            weights.after_use = functools.partial(self._take, layer)
            self._layers[layer] = []
            for expert in AXES:
                tensors = [
                    (s.parameter, s.leaf, s.owner) for s in model.shards if (s.layer, s.expert) == (layer, expert)
                ]
                if model.tied and model.tied.copy is not None and (layer, expert) == (model.stages[-1][-1], False):
                    tensors.append((model.tied.copy, model.tied.copy, 0))
                if tensors:
                    self._layers[layer].append(_LayerGradients(tensors, mesh, expert))

    def begin(self, microbatches: int) -> None:
        """Start a step. microbatches: number of micro-batches of the global batch, without those that only pad it."""
        self._first_parts: dict[tuple[int, int], list[Tensor | None]] = {}
        for layer in self._layers.values():
            for part in layer:
                part.begin(microbatches)

    @contextmanager
    def around_backward(self, action: Action, last: bool) -> Iterator[None]:
        """Send the gradients that the action computes."""
        self._action = action
        yield
        self._action = None
        if action.kind is ActionKind.BACKWARD_WEIGHT:  # layers whose backward was not split are not used in it
            for layer in self._stages[action.stage]:
                if gradients := self._first_parts.pop((layer, action.microbatch), None):
                    self._send(layer, action.microbatch, gradients)

    def finish(self) -> None:
        """Set `.grad` of this rank's own parameters to the sum over the global batch (collective) [3] [4]."""
        for layer in self._layers.values():
            for part in layer:
                part.finish()
        if self._tied and self._mesh.dp_rank == 0:  # the owner
            self._tied.sum_gradients()

    def _take(self, layer: int) -> None:
        """Take the gradients of a layer that has been used, and send them if they are complete."""
        if not torch.is_grad_enabled():  # evaluation
            return
        leaves = [leaf for part in self._layers[layer] for leaf in part.leaves]
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        action = self._action
        if action is None:  # a forward, or a backward that only loads kernels
            return
        place = layer, action.microbatch
        if action.kind is ActionKind.BACKWARD_INPUT:
            self._first_parts[place] = gradients
            return
        if place in self._first_parts:
            gradients = [sum_parts(*pair) for pair in zip(self._first_parts.pop(place), gradients, strict=True)]
        self._send(layer, action.microbatch, gradients)

    def _send(self, layer: int, microbatch: int, gradients: list[Tensor | None]) -> None:
        for part in self._layers[layer]:
            own = gradients[: len(part.leaves)]
            del gradients[: len(part.leaves)]  # so that `add` can free them
            assert all(gradient is not None for gradient in own)
            part.add(microbatch, own)  # type: ignore[arg-type]


class _LayerGradients:
    """The gradients of the parameters of a layer that are replicated on the same ranks.

    tensors: parameter, autograd leaf and owner of each.
    """

    def __init__(self, tensors: Sequence[tuple[Tensor, Tensor, int]], mesh: Mesh, expert: bool) -> None:
        self._parameters, self.leaves, self._owners = zip(*tensors, strict=True)
        self._group = mesh.groups[AXES[expert]]
        self._ranks, self._rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        self._sources = mesh.layout.ep if expert and mesh.separates_sources else 1  # gradients of a backward
        self._dp = mesh.layout.dp

    def begin(self, microbatches: int) -> None:
        """Start a step, see `ShardedGradientSum.begin`."""
        # Where experts do not separate the rows of sending ranks, one gradient is that of several micro-batches.
        self._replicas = self._ranks * self._sources
        is_whole = self._replicas == self._dp
        self._leaves = microbatches if is_whole else -(-microbatches // self._dp) * self._replicas
        self._trees: dict[int, TreeSum] = defaultdict(lambda: TreeSum(self._leaves))  # by bucket
        for parameter in self._parameters:
            parameter.grad = None

    def add(self, microbatch: int, gradients: list[Tensor]) -> None:
        """Add the gradients of every replica's micro-batch with this number (collective). The list is emptied."""
        rows = []  # [owner][source, numbers]
        for rank in range(self._ranks):
            own = [g.reshape(self._sources, -1) for g, o in zip(gradients, self._owners, strict=True) if o == rank]
            empty = self._parameters[0].new_empty(self._sources, 0)
            rows.append(own[0] if len(own) == 1 else torch.cat([empty, *own], 1))
        del own
        gradients.clear()
        width = BUCKET // (rows[0].element_size() * self._replicas)
        for bucket in range(-(-max(row.shape[1] for row in rows) // width)):
            parts = [row[:, bucket * width : (bucket + 1) * width] for row in rows]
            received = self._exchange(parts)
            tree = TreeSum(self._leaves)
            for number, row in enumerate(received, microbatch * self._replicas):
                if number < self._leaves:  # not for micro-batches that pad the batch
                    tree.add(range(number, number + 1), [row])
            for node, (total,) in tree.sums.items():
                self._trees[bucket].add(node, [total.clone()])  # [2] without the memory of the other rows

    def _exchange(self, parts: Sequence[Tensor]) -> Tensor:
        """[1] Send parts[r] [sources, …] to each rank r, and return those for this rank: [replicas, numbers]."""
        sent = torch.cat([part.reshape(-1) for part in parts])
        own = parts[self._rank]
        if self._ranks == 1:
            return sent.view(self._replicas, own.shape[1])
        received = sent.new_empty(self._replicas, own.shape[1])
        sizes = [part.numel() for part in parts]
        dist.all_to_all_single(received.view(-1), sent, [own.numel()] * self._ranks, sizes, group=self._group)
        return received

    def finish(self) -> None:
        """Set the gradients of the own parameters, see `ShardedGradientSum.finish`."""
        own = [p for p, owner in zip(self._parameters, self._owners, strict=True) if owner == self._rank]
        sums = [self._trees.pop(bucket).sums[range(self._leaves)][0] for bucket in sorted(self._trees)]
        values = sums[0] if len(sums) == 1 else torch.cat(sums)
        for parameter, part in zip(own, values.split([p.numel() for p in own]), strict=True):
            parameter.grad = part.view_as(parameter)
