"""Linear layers of several experts at once: consecutive groups of rows, each multiplied by the weight of its expert.

Shapes: n rows sorted by expert, E experts.

    x       [n, in]       sizes   {e: number of rows of expert e}, Σ ≤ n; rows after the last group belong to no expert
    weight  [E, out, in]  bias    [E, out]
    y       [n, out]      rows of group e: x weight[e]ᵀ + bias[e]; rows of no expert: 0

Weights [R, E, out, in] and biases [R, E, out] have R versions of each expert, group r·E + e that of weight[r, e].

The product is three autograd nodes, so that either gradient can be computed without the other, as a split backward
does. A single autograd.Function always computes all of its gradients.

    x ────────────→ [rows] ── y ──┐
                                  ├─→ [join] → y         grad_x      = grad_y weight     in [rows].backward
    weight, bias ─→ [weights] ────┘                      grad_weight = grad_yᵀ x         in [weights].backward

[weights] returns a placeholder of y's shape without memory. [join] returns y and passes grad_y to both branches.
For frozen weights there is only [rows].

On a CPU a row of y does not depend on the rows of other experts. Two details ensure this: the rounding of a product
depends on the alignment of its factors in memory, so factors start at multiples of ALIGNMENT bytes; and the rounding of
elementwise functions differs for the last elements of a contiguous tensor, so the rows of y are padded to ALIGNMENT.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fira.nn.autocast import product_dtype
from fira.nn.kernels.fused import use_fused

ALIGNMENT = 128  # bytes of two vectors of 512 bits, which torch's elementwise functions process at a time


class RowGroups:
    """Sizes of consecutive groups of rows.

    counts: [E] int64, the number of rows of each expert, in the order of the experts. sizes: the same on the host, by
    expert, in the order of the groups; None: computed from counts when needed. ragged: there may be rows after the last
    group, which belong to no expert.
    """

    def __init__(self, counts: Tensor | None, sizes: dict[int, int] | None = None, ragged: bool = False) -> None:
        self.counts = counts
        self.ragged = ragged
        if sizes is not None:
            self.sizes = sizes

    @cached_property
    def sizes(self) -> dict[int, int]:
        """Rows by expert, in the order of the groups, on the host. Synchronises with the device of `counts`."""
        assert self.counts is not None
        return dict(enumerate(self.counts.tolist()))

    @cached_property
    def ends(self) -> Tensor:
        """[E] int32, the end of each group."""
        assert self.counts is not None
        return self.counts.cumsum(0, dtype=torch.int32)


def grouped_linear(x: Tensor, groups: RowGroups, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, in], weight [(R,) E, out, in], bias [(R,) E, out] → y [n, out]; see the shapes at the top of this file.

    The gradient of an expert without rows is zero. In bf16, on GPUs that have it, one kernel reads the sizes
    on the device. Otherwise each group is a product that writes into a slice of the result, in the backward as well,
    without copies. On a CPU that is at least as fast as torch's grouped_mm; on CUDA it copies the sizes to the host
    once for all products with the same groups, where torch's grouped_mm would do so in every call.
    """
    if torch.is_autocast_enabled(x.device.type):  # autocast does not apply inside an autograd.Function
        dtype = product_dtype(x)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if _has_grouped_kernel(x):
        return _grouped_mm(x, groups, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias, groups.sizes)
    y = _Rows.apply(x, (weight, bias), groups.sizes)
    if not weight.requires_grad and (bias is None or not bias.requires_grad):
        return y
    return _Join.apply(y, _Weights.apply(weight, bias, x.detach(), groups.sizes))


def add_rows(y: Tensor, z: Tensor) -> Tensor:
    """Return y + z in the memory of y, a result of `grouped_linear` that is not used otherwise: its rows are padded."""
    return _AddRows.apply(y, z)


def _has_grouped_kernel(x: Tensor) -> bool:
    """Whether grouped_mm of torch is a kernel for rows x: in bf16 on sm_90 and sm_100. It is absent in older versions.

    On other devices grouped_mm copies the sizes to the host and runs one product per group.
    """
    if not x.is_cuda or x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def _grouped_mm(x: Tensor, groups: RowGroups, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`grouped_linear` without copying the sizes to the host."""
    if not groups.ragged:
        y = _aligned_grouped_mm(x, weight, groups.ends)
        return y if bias is None else _add_bias(y, groups, bias)
    # The kernel leaves rows after the last group uninitialised in y and in the gradient of x.
    inside = (torch.arange(len(x), device=x.device) < groups.ends[-1])[:, None]
    y = _aligned_grouped_mm(x.where(inside, 0), weight, groups.ends).where(inside, 0)
    return y if bias is None else _add_bias(y, groups, bias)


def _add_bias(y: Tensor, groups: RowGroups, bias: Tensor) -> Tensor:
    """y [n, out] plus the bias [E, out] of each row's expert, without copying the sizes to the host."""
    if use_fused(y):
        from fira.nn.kernels.bias_gelu import AddBias

        return AddBias.apply(_join_bias(y, groups, bias), bias.detach(), groups.ends)
    # The gradient of an indexed bias would add one row after another; that of a product with a one-hot matrix does not.
    expert = torch.searchsorted(groups.ends, torch.arange(len(y), device=y.device), right=True)
    one_hot = expert[:, None] == torch.arange(len(bias), device=y.device)
    return torch.addmm(y, one_hot.to(y.dtype), bias)


def fused_bias_gelu(z: Tensor, groups: RowGroups, bias: Tensor, mask: tuple[Tensor, int, int, float] | None) -> Tensor:
    """drop(gelu(z + bias)) of a product z [n, out] without its bias [E, out], in one kernel.

    mask: row keys [n] and `hash_arguments` of the dropout; None: no dropout.
    """
    from fira.nn.kernels.bias_gelu import BiasGelu

    return BiasGelu.apply(_join_bias(z, groups, bias), bias.detach(), groups.ends, mask)


def _join_bias(z: Tensor, groups: RowGroups, bias: Tensor) -> Tensor:
    """z, connected to the bias: the gradient of z is passed on, and summed over the rows of each expert."""
    return _Join.apply(z, _BiasSums.apply(bias, groups.ends, len(z)))


def _aligned_grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The product without bias. The kernel needs rows of a multiple of 16 bytes; other widths are padded with zeros."""
    width, unit = weight.shape[1], 16 // x.element_size()
    pad_out, pad_in = (-size % unit for size in weight.shape[1:])
    if pad_in:
        x = F.pad(x, (0, pad_in))
    if pad_in or pad_out:
        weight = F.pad(weight, (0, pad_in, 0, pad_out))
    # The kernel rejects a row that is expanded to several, as in decoding one token.
    return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)[:, :width]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: dict[int, int]) -> Tensor:
    """y of the shapes above; with grad_y and weightᵀ it is grad_x."""
    y = empty_rows(x, weight.shape[-2])
    spans = _spans(sizes, len(x))
    rows, outputs = _aligned(x.split_with_sizes(spans)), y.split_with_sizes(spans)
    factors = _aligned(_by_group(weight.mT, sizes, 2))
    biases = factors if bias is None else _by_group(bias, sizes, 1)
    for size, a, factor, added, out in zip(spans, rows, factors, biases, outputs, strict=False):
        if not size:
            continue
        if bias is None:
            torch.mm(a, factor, out=out)
        else:
            torch.addmm(added, a, factor, out=out)
    if spans[-1]:
        y[-spans[-1] :] = 0
    return y


def empty_rows(x: Tensor, width: int) -> Tensor:
    """Uninitialised rows [n, width] for the rows x [n, …], padded to ALIGNMENT."""
    unit = ALIGNMENT // x.element_size()
    y = x.new_empty(len(x), -(-width // unit) * unit)
    return y[:, :width] if y.shape[1] > width else y


def _by_group(stacked: Tensor, sizes: dict[int, int], dims: int) -> Sequence[Tensor]:
    """The tensors of `dims` dimensions of the groups in `sizes`, in their order, from those of all [(R,) E, …]."""
    if stacked.dim() == dims + 1 and len(sizes) < len(stacked):  # few of many experts, as in decoding
        return [stacked[e] for e in sizes]
    versions = stacked.unbind() if stacked.dim() > dims + 1 else [stacked]
    parts = [part for version in versions for part in version.unbind()]
    return [parts[e] for e in sizes]


def _aligned(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The parts of one tensor, copied where they are not at an aligned address. torch's allocations are aligned."""
    return parts if _are_aligned(parts) else [part if _are_aligned([part]) else part.clone() for part in parts]


def _are_aligned(parts: Sequence[Tensor]) -> bool:
    unit = ALIGNMENT // parts[0].element_size()
    return not any(part.storage_offset() % unit for part in parts)


def _spans(sizes: dict[int, int], rows: int) -> list[int]:
    """The sizes of the groups, and the number of rows after the last one."""
    return [*sizes.values(), rows - sum(sizes.values())]


class _Rows(torch.autograd.Function):
    """[rows]: the product as a function of x; its backward is grad_x.

    Weight and bias are in a tuple, so that autograd takes them for constants. Detached tensors would keep the memory of
    weights that ZeRO 3 frees between the forward pass and the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, constants: tuple[Tensor, Tensor | None], sizes: dict[int, int]) -> Tensor:
        weight, bias = constants
        ctx.save_for_backward(weight)
        ctx.sizes = sizes
        return _product(x, weight, bias, sizes)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(grad_y, weight.transpose(-2, -1), None, ctx.sizes), None, None


class _Weights(torch.autograd.Function):
    """[weights]: placeholder for the product; its backward is grad_weight and grad_bias."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor, sizes: dict[int, int]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sizes, ctx.shape, ctx.biased = sizes, weight.shape, bias is not None
        return weight.new_empty(()).expand(len(x), weight.shape[-2])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        # Experts that are missing in sizes have no product below that would write their gradient.
        new = grad_y.new_empty if len(ctx.sizes) == math.prod(ctx.shape[:-2]) else grad_y.new_zeros
        grad_weight = new(ctx.shape)
        grad_bias = new(ctx.shape[:-1]) if ctx.biased else None
        spans = _spans(ctx.sizes, len(x))
        grad_rows = grad_y.split_with_sizes(spans)
        targets = _by_group(grad_weight, ctx.sizes, 2)
        aligned = _are_aligned(targets)
        for target, a, b in zip(targets, _aligned(grad_rows), _aligned(x.split_with_sizes(spans)), strict=False):
            if aligned:
                torch.mm(a.T, b, out=target)
            else:
                target.copy_(torch.mm(a.T, b))
        if grad_bias is not None:
            for target, a in zip(_by_group(grad_bias, ctx.sizes, 1), grad_rows, strict=False):
                torch.sum(a, 0, out=target)
        return grad_weight, grad_bias, None, None


class _BiasSums(torch.autograd.Function):
    """Placeholder of shape [n, out] for the bias of each row; its backward is grad_bias, in one kernel."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, ends: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(ends)
        ctx.dtype = bias.dtype
        return bias.new_empty(()).expand(rows, bias.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from fira.nn.kernels.bias_gelu import sum_by_group

        return sum_by_group(grad, ctx.saved_tensors[0], ctx.dtype), None, None


class _Join(torch.autograd.Function):
    """[join]: y, connected to both branches; its backward passes grad_y to each."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, placeholder: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        return grad_y, grad_y


class _AddRows(torch.autograd.Function):
    """y + z, written to y. No backward needs the value that is overwritten."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor) -> Tensor:
        return y.add_(z).view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad
