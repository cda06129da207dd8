"""Weights in the dtype of autocast, cast once per step instead of in every call of a layer.

Autocast casts the fp32 matrices of a layer in each of its calls. Within `cast_weights` all calls use the same copies:

    parameter fp32 ──[1]──► copy bf16 ──┬─[2]─► leaf of call 0 ──► products with micro-batch 0
         ▲                              └─[2]─► leaf of call 1 ──► products with micro-batch 1
         └──[3]── parameter.grad fp32 += leaf.grad bf16 ◄──────────────────┘

[1] On entry, cast every matrix once.
[2] In each call of a layer, use new leaves of the autograd graph, which share the memory of the copies. Frozen weights
    have no gradient, and the copies themselves are used.
[3] As soon as autograd has computed the gradient of a leaf, add it to the `.grad` of the parameter.

The gradient is bitwise that of plain autocast, which converts leaf.grad to fp32 and adds it. An addition with mixed
dtypes does both in one kernel and needs no temporary gradient in fp32.

One leaf for all calls would be less precise. Within one backward autograd sums the gradients of a leaf in its dtype,
and torchgpipe computes the backward of all chunks of a micro-batch as one. Within one call of a layer plain autocast
sums in the low precision as well, because its cache then holds a single cast of the weight. Only the order differs in
which the chunks of several micro-batches are summed in fp32.

The loss sums the gradient of the head's weight in fp32, so the head keeps its parameter and gets the copy in addition.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fira.nn.embedding import Head
from fira.nn.moe.experts import ExpertBank
from fira.nn.moe.router import Router
from pipeline.stage import Autocast


@contextmanager
def cast_weights(
    modules: Iterable[nn.Module], divided: Mapping[nn.Module, list["CastCopy"]] | None = None
) -> Iterator[None]:
    """Cast the matrices of all layers that are wrapped by an `Autocast` with a dtype; without one, do nothing.

    modules: all modules of a rank. The parameters must not change within the context; they are restored at its end.
    divided: of layers whose parameters the replicas divide, lists that get the copies. These have no memory until they
    are filled.
    """
    with ExitStack() as restore:
        for module in modules:
            if isinstance(module, Autocast) and module.dtype is not None:
                copies = _cast_layer(module.layer, module.dtype, restore)
                if divided:
                    divided[module.layer].extend(copies)
                    restore.callback(divided[module.layer].clear)
                for copy in copies:
                    (copy.free if divided else copy.fill)()
        yield


def cast_parameters(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield each matrix that autocast casts, as its module and its name: those of linear layers and of experts.

    Embedding tables are not factors of a product, and routers compute in full precision.
    """
    if isinstance(layer, Router):
        return
    if isinstance(layer, ExpertBank):
        yield from ((layer, name) for name in layer.matrices())
    elif isinstance(layer, nn.Linear):
        yield layer, "weight"
    for child in layer.children():
        yield from cast_parameters(child)


class CastCopy:
    """A copy of a parameter in another dtype, of experts' weights [R, …] that are expanded without copies as well."""

    def __init__(self, parameter: Tensor, dtype: torch.dtype) -> None:
        self._parameter = parameter.detach()[0] if parameter.dim() == 4 else parameter.detach()
        self._memory = torch.empty_like(self._parameter, dtype=dtype)
        self.tensor = self._memory.expand(parameter.shape)

    def fill(self) -> None:
        """Cast the parameter [1]."""
        storage = self._memory.untyped_storage()
        if not storage.nbytes():
            storage.resize_(self._memory.nbytes)
        self._memory.data.copy_(self._parameter)  # .data: autograd may have saved the copy, whose values do not change

    def free(self) -> None:
        """Free the memory of the copy until it is filled again."""
        self._memory.untyped_storage().resize_(0)


def _cast_layer(layer: nn.Module, dtype: torch.dtype, restore: ExitStack) -> list[CastCopy]:
    """Replace the matrices of one layer by copies until `restore` is closed, and return these."""
    if isinstance(layer, Head):  # its loss needs the parameter, whose gradient it sums in fp32
        copy = CastCopy(layer.project.weight, dtype)
        layer.cast_weight = copy.tensor
        restore.callback(setattr, layer, "cast_weight", None)
        return [copy]
    weights = []
    for module, name in cast_parameters(layer):
        weights.append(_CastWeight(module, name, dtype))
        restore.callback(weights[-1].restore)
    trained = [weight for weight in weights if weight.parameter.requires_grad]

    def renew_leaves(*_: Any) -> None:
        if torch.is_grad_enabled():
            for weight in trained:
                weight.renew_leaf()

    restore.callback(layer.register_forward_pre_hook(renew_leaves).remove)
    return [weight.copy for weight in weights]


class _CastWeight:
    """A parameter whose place in its module is taken by a copy in another dtype."""

    def __init__(self, module: nn.Module, name: str, dtype: torch.dtype) -> None:
        self.module, self.name = module, name
        self.parameter = module.get_parameter(name)
        self.copy = CastCopy(self.parameter, dtype)
        self._replace(self.copy.tensor)

    def renew_leaf(self) -> None:
        leaf = self.copy.tensor.detach().requires_grad_()  # [2]
        leaf.register_post_accumulate_grad_hook(self._accumulate)
        self._replace(leaf)

    def restore(self) -> None:
        self._replace(self.parameter)

    def _accumulate(self, leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None  # [3]
        assert grad is not None
        if self.parameter.grad is None:
            self.parameter.grad = grad.to(self.parameter.dtype)
        else:
            self.parameter.grad += grad
        for hook in (self.parameter._post_accumulate_grad_hooks or {}).values():
            hook(self.parameter)  # which autograd calls for parameters that are not cast

    def _replace(self, weight: Tensor) -> None:
        self.module._parameters[self.name] = weight  # type: ignore[assignment]  # nn.Module accepts parameters only
