"""Conversion of tensors to MPI buffers: address, count and datatype."""

import ctypes
import functools
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from mpi4py import MPI
from torch import Tensor
from torch.distributed import ReduceOp

_NUMBER_TYPES = {
    torch.uint8: MPI.UINT8_T,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
    torch.bool: MPI.C_BOOL,
}

BLOCK = 2**30  # bytes per block of a larger message, whose count would not fit 31 bits
UNLOCKED = 64 * 1024  # bytes from which a copy releases the global interpreter lock
EMPTY = MPI.memory.allocate(0)
_NARROW = (torch.int8, torch.uint8, torch.int16, torch.uint16)
REDUCED_BY_MPI_ONLY = (torch.uint16, torch.uint32, torch.uint64)  # torch implements almost no arithmetic for them


def memory(tensor: Tensor) -> MPI.memory:
    """Return the memory of a contiguous tensor. Slicing it is ten times as fast as slicing the tensor.

    The caller keeps the tensor alive.
    """
    return MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes)


def memories(tensors: list[Tensor]) -> list[MPI.memory]:
    """Return the memory of each contiguous tensor."""
    return [memory(tensor) for tensor in tensors]


def split(buffer: MPI.memory, sizes: list[int]) -> list[MPI.memory]:
    """Split memory into consecutive parts of these sizes in bytes."""
    return [buffer[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def message(part: MPI.memory) -> list[Any]:
    """Return an MPI buffer that sends or receives memory as raw bytes, independent of the dtype."""
    return [part, MPI.BYTE] if part.nbytes < BLOCK else [part, 1, _huge(part.nbytes)]


def as_bytes(tensor: Tensor) -> list[Any]:
    """Return an MPI buffer of a contiguous tensor's raw bytes. The caller keeps the tensor alive."""
    return message(memory(tensor))


def copy(target: MPI.memory, source: MPI.memory) -> None:
    """Copy bytes; large copies release the global interpreter lock."""
    if source.nbytes < UNLOCKED:
        target[:] = source
    else:
        ctypes.memmove(target.address, source.address, source.nbytes)


@functools.cache
def _huge(size: int) -> MPI.Datatype:
    """Return a datatype of ``size`` bytes. Before MPI 4, as in Open MPI 5, a count is less than 2³¹."""
    blocks, rest = divmod(size, BLOCK)
    block = MPI.BYTE.Create_contiguous(BLOCK)
    return MPI.Datatype.Create_struct([blocks, rest], [0, blocks * BLOCK], [block, MPI.BYTE]).Commit()


def as_numbers(tensor: Tensor) -> list[Any]:
    """Return an MPI buffer of a contiguous tensor's elements for a reduction. The caller keeps the tensor alive."""
    return [memory(tensor), _NUMBER_TYPES[tensor.dtype]]


def reducible(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor that MPI can reduce: the tensor itself, or a wider copy of 8- and 16-bit elements.

    MPI has no type for floats of these widths, and Open MPI saturates sums of such integers instead of wrapping around.

    Raises:
        TypeError: if the dtype cannot be reduced.
    """
    if tensor.dtype not in _NUMBER_TYPES:
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"the mpi backend cannot reduce {tensor.dtype} tensors")
        return tensor.float().contiguous()
    return (tensor.int() if tensor.dtype in _NARROW else tensor).contiguous()


class Reduction(NamedTuple):
    """Implementation of a ``ReduceOp``."""

    mpi_op: MPI.Op
    mpi_bool_op: MPI.Op
    torch_op: Callable[..., Tensor]
    averages: bool = False
    factor: Any = None  # PREMUL_SUM: the inputs are multiplied by it

    def by_mpi(self, dtype: torch.dtype) -> MPI.Op:
        """Return the MPI operation. ``prepare`` and ``finish`` add what AVG and PREMUL_SUM do beyond a sum."""
        return self.mpi_bool_op if dtype == torch.bool else self.mpi_op

    def prepare(self, tensor: Tensor) -> Tensor:
        """Return the tensor multiplied by the factor; without a factor, the tensor itself."""
        return tensor if self.factor is None else tensor * self.factor

    def finish(self, total: Tensor, size: int) -> None:
        """For AVG, divide the sum over ``size`` ranks in place. Integers are truncated as in NCCL."""
        if self.averages:
            total.div_(size, rounding_mode=None if total.is_floating_point() or total.is_complex() else "trunc")

    def combine(self, parts: list[Tensor], result: Tensor, scratch: Tensor) -> None:
        """Reduce ``parts`` from the first to the last; 8- and 16-bit floats are accumulated in float32.

        Args:
            result: the output; may be one of the parts.
            scratch: temporary memory; may be the first or the second part.
        """
        if result.dtype not in _NUMBER_TYPES:
            parts = [part.float() for part in parts]
            scratch = parts[0]
        total = parts[0]
        for part in parts[1:]:
            last = part is parts[-1] and scratch.dtype == result.dtype
            total = self.torch_op(total, part, out=result if last else scratch)
        self.finish(total, len(parts))
        if total is not result:
            result.copy_(total)


_REDUCTIONS = {  # keyed by value: a ReduceOp is not hashable in every version of torch and slow to compare
    ReduceOp.SUM.value: Reduction(MPI.SUM, MPI.LOR, torch.add),
    ReduceOp.AVG.value: Reduction(MPI.SUM, MPI.LOR, torch.add, averages=True),
    ReduceOp.PREMUL_SUM.value: Reduction(MPI.SUM, MPI.LOR, torch.add),
    ReduceOp.MIN.value: Reduction(MPI.MIN, MPI.LAND, torch.minimum),
    ReduceOp.MAX.value: Reduction(MPI.MAX, MPI.LOR, torch.maximum),
    ReduceOp.PRODUCT.value: Reduction(MPI.PROD, MPI.LAND, torch.mul),
    ReduceOp.BAND.value: Reduction(MPI.BAND, MPI.LAND, torch.bitwise_and),
    ReduceOp.BOR.value: Reduction(MPI.BOR, MPI.LOR, torch.bitwise_or),
    ReduceOp.BXOR.value: Reduction(MPI.BXOR, MPI.LXOR, torch.bitwise_xor),
}


def reduction(op: ReduceOp) -> Reduction:
    """Return the implementation of ``op``.

    Raises:
        ValueError: if it is not supported.
    """
    kind = cast(Any, op).op.value
    found = _REDUCTIONS.get(kind)
    if found is None:
        raise ValueError(f"the mpi backend does not support {op}")
    if kind == ReduceOp.PREMUL_SUM.value:
        _, factor = cast(Any, op).__getstate__()
        return found._replace(factor=factor)
    return found
