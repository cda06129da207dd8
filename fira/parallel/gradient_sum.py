"""Sum gradients over micro-batches and replicas in the order of a binary tree, the same on every layout.

    backward of micro-batch i      .grad of this micro-batch alone
      [1] take the gradients       a leaf of the tree of each stage; .grad is None again
      [2] end of the step          the trees of the replicas are completed: over dp, for experts over edp
      [3]                          the gradient of a tied embedding is added
                                   parameter.grad, the gradient of the global batch

On R ranks of an ep group, an expert has rows of R micro-batches at a time, one of each rank. Its gradient is computed
for each of them, [R, experts of this rank, …], so that R leaves are added.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from fira.parallel.owners import Owners
from fira.parallel.parallelize import DistributedModel
from pipeline.mesh import Mesh
from pipeline.schedule import Action, ActionKind
from pipeline.tree_sum import TreeSum, all_reduce, leaves_of, nodes_by_rank, reduce_scatter

BUCKET = 2**22  # bytes of a bucket of smaller gradients, small enough to stay in the CPU cache


class GradientSum:
    """Sums the gradients of one step: `begin`, then the backward within `around_backward`, then `finish`.

    If the owners are sharded, only the owner of a parameter gets its gradient.
    """

    def __init__(self, model: DistributedModel, mesh: Mesh, owners: Owners) -> None:
        self._mesh, self._owners = mesh, owners
        self._tied = model.tied
        self._parameters: dict[bool, list[Tensor]] = {False: [], True: []}  # dense, experts, in the order of the stages
        self._stages: dict[int, dict[bool, list[Tensor]]] = {}  # their autograd leaves
        for number in model.engine.stages:
            layers = model.stages[number]
            shards = [shard for shard in model.shards if shard.layer in layers]
            leaves = {expert: [s.leaf for s in shards if s.expert == expert] for expert in (False, True)}
            for shard in shards:
                self._parameters[shard.expert].append(shard.parameter)
            if model.tied and model.tied.copy is not None and number == len(model.stages) - 1:
                leaves[False].append(model.tied.copy)
                self._parameters[False].append(model.tied.copy)
            self._stages[number] = leaves

    def begin(self, microbatches: int) -> None:
        """Start a step. microbatches: number of micro-batches of the global batch, without those that only pad it."""
        self._microbatches = microbatches
        self._first_parts: dict[tuple[int, int], list[Tensor | None]] = {}
        self._trees = {number: {False: TreeSum(microbatches), True: TreeSum(microbatches)} for number in self._stages}
        for tensor in chain(*self._parameters.values(), *(chain(*stage.values()) for stage in self._stages.values())):
            tensor.grad = None

    @contextmanager
    def around_backward(self, action: Action, last: bool) -> Iterator[None]:
        """Take the gradients that the action has computed [1]."""
        yield
        leaves = list(chain(*self._stages[action.stage].values()))
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        place = action.stage, action.microbatch
        if action.kind is ActionKind.BACKWARD_INPUT:
            self._first_parts[place] = gradients
            return
        if place in self._first_parts:
            gradients = [sum_parts(*pair) for pair in zip(self._first_parts.pop(place), gradients, strict=True)]
        assert all(gradient is not None for gradient in gradients)
        complete: list[Tensor] = gradients  # type: ignore[assignment]
        dense = len(self._stages[action.stage][False])
        self._add(action, complete[:dense], complete[dense:])

    def finish(self) -> None:
        """Set `.grad` of all parameters to the sum over the global batch (collective) [2] [3]."""
        for expert, axis in ((False, "dp"), (True, "edp")):
            # The replicas of an ep group are consecutive, so the leaves of a rank are consecutive along edp as well.
            group = self._mesh.groups[axis]
            nodes = nodes_by_rank(dist.get_world_size(group), self._microbatches)[dist.get_rank(group)]
            trees = [trees[expert] for trees in self._trees.values()]
            own = [list(chain(*(tree.sums.pop(node) for tree in trees))) for node in nodes]
            parameters = self._parameters[expert]
            for parameter, gradient in zip(parameters, self._reduce(parameters, own, group), strict=True):
                parameter.grad = gradient
        if self._tied and (not self._owners.sharded or self._mesh.dp_rank == 0):  # the owner, see `Owners`
            self._tied.sum_gradients()

    def _add(self, action: Action, dense: list[Tensor], experts: list[Tensor]) -> None:
        """Add the gradients of one micro-batch, and for experts of one micro-batch of each ep rank."""
        mesh, trees = self._mesh, self._trees[action.stage]
        self._add_leaf(trees[False], mesh.dp_rank, action.microbatch, dense)
        sources = mesh.layout.ep
        for source in range(sources):
            gradients = [gradient[source] for gradient in experts] if sources > 1 else experts
            self._add_leaf(trees[True], mesh.edp_rank * sources + source, action.microbatch, gradients)

    def _add_leaf(self, tree: TreeSum, replica: int, microbatch: int, gradients: list[Tensor]) -> None:
        """Add the gradients of a replica's micro-batch, unless it has no sequences."""
        numbers = leaves_of(replica, self._mesh.layout.dp, self._microbatches)
        if microbatch < len(numbers):
            tree.add(numbers[microbatch : microbatch + 1], gradients)

    def _reduce(
        self, parameters: Sequence[Tensor], own: list[list[Tensor]], group: dist.ProcessGroup
    ) -> Sequence[Tensor | None]:
        """The sums over all ranks of a group, for each parameter.

        own: the sums of this rank's nodes. The lists are emptied from the end, so that a sum is freed when its bucket
        has been reduced.
        """
        ranks = dist.get_world_size(group)
        if ranks == 1:
            return [_own_memory(own[0].pop()) for _ in parameters][::-1]
        if self._owners.sharded:
            return self._reduce_to_owners(parameters, own, group)
        reduced: list[Tensor | None] = [None] * len(parameters)
        for bucket in reversed(buckets(parameters)):
            sizes = [parameter.numel() for parameter in parameters[bucket]]
            length = sum(sizes)
            sums = [_flatten(_take(gradients, bucket), -(-length // ranks) * ranks) for gradients in own]
            result = parameters[bucket.start].new_empty(-(-length // ranks) * ranks)
            all_reduce(sums, self._microbatches, result, group)
            del sums
            parts = zip(parameters[bucket], result[:length].split(sizes), strict=True)
            reduced[bucket] = [part.view_as(parameter) for parameter, part in parts]
        return reduced

    def _reduce_to_owners(
        self, parameters: Sequence[Tensor], own: list[list[Tensor]], group: dist.ProcessGroup
    ) -> list[Tensor | None]:
        """The same for the parameters that this rank owns, and None for others."""
        rank = dist.get_rank(group)
        reduced: list[Tensor | None] = [None] * len(parameters)
        owners = [self._owners.owner(parameter) for parameter in parameters]
        for bucket in reversed(buckets(parameters)):
            order = sorted(range(bucket.start, bucket.stop), key=owners.__getitem__)
            sizes = [0] * dist.get_world_size(group)
            for i in order:
                sizes[owners[i]] += parameters[i].numel()
            sums = [_join(_take(gradients, bucket), [i - bucket.start for i in order]) for gradients in own]
            part = _own_memory(reduce_scatter(sums, self._microbatches, sizes, parameters[order[0]], group))
            del sums
            mine = [i for i in order if owners[i] == rank]
            for i, values in zip(mine, part.split([parameters[i].numel() for i in mine]), strict=True):
                reduced[i] = values.view_as(parameters[i])
        return reduced


def sum_parts(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum of the gradients of both parts of a backward; most parameters have a gradient in one of them only."""
    if first is None or second is None:
        return second if first is None else first
    return first.add_(second)


def buckets(tensors: Sequence[Tensor]) -> list[slice]:
    """Slices of consecutive tensors on one device; a slice is complete when it has at least BUCKET bytes."""
    result: list[slice] = []
    size = BUCKET  # the first tensor starts a bucket
    for i, tensor in enumerate(tensors):
        if size >= BUCKET or tensor.device != tensors[i - 1].device:
            result.append(slice(i, i))
            size = 0
        result[-1] = slice(result[-1].start, i + 1)
        size += tensor.nbytes
    return result


def _take(tensors: list[Tensor], bucket: slice) -> list[Tensor]:
    """Remove the tensors of the last bucket from a list, and return them."""
    taken = tensors[bucket]
    del tensors[bucket]
    return taken


def _own_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it is a part of a larger memory, for example that of the gradients of other ranks."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _join(tensors: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """All numbers of the tensors in this order in one tensor."""
    return torch.cat([tensors[i].flatten() for i in order])


def _flatten(tensors: Sequence[Tensor], length: int) -> Tensor:
    """All numbers of the tensors in one tensor [length], with zeros at the end."""
    if len(tensors) == 1 and tensors[0].numel() == length:
        return tensors[0].reshape(-1)
    flat = tensors[0].new_zeros(length)
    torch.cat([tensor.flatten() for tensor in tensors], out=flat[: sum(map(torch.numel, tensors))])
    return flat
