"""Tensors as MPI sees them: an address, a count and a datatype."""

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

BLOCK = 2**30  # bytes MPI is given one by one; more go in blocks
UNLOCKED = 64 * 1024  # bytes from which a copy lets other threads run
NOTHING = MPI.memory.allocate(0)
_NARROW = (torch.int8, torch.uint8, torch.int16, torch.uint16)
_ONLY_MPI = (torch.uint16, torch.uint32, torch.uint64)  # torch has next to no arithmetic for them


def memory(tensor: Tensor) -> MPI.memory:
    """A contiguous tensor's bytes; cutting them costs a tenth of cutting tensors. The caller keeps the tensor alive."""
    return MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes)


def memories(tensors: list[Tensor]) -> list[MPI.memory]:
    """``memory`` of each."""
    return [memory(tensor) for tensor in tensors]


def cut(whole: MPI.memory, sizes: list[int]) -> list[MPI.memory]:
    """Memory in parts of these numbers of bytes, one after the other."""
    return [whole[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def message(part: MPI.memory) -> list:
    """Memory as raw bytes to send or receive: any dtype crosses this way."""
    return [part, MPI.BYTE] if part.nbytes < BLOCK else [part, 1, _huge(part.nbytes)]


def as_bytes(tensor: Tensor) -> list:
    """A contiguous tensor as raw bytes to send or receive. The caller keeps the tensor alive."""
    return message(memory(tensor))


def copy(target: MPI.memory, source: MPI.memory) -> None:
    """Copy bytes, without Python's lock where that pays."""
    if source.nbytes < UNLOCKED:
        target[:] = source
    else:
        ctypes.memmove(target.address, source.address, source.nbytes)


@functools.cache
def _huge(size: int) -> MPI.Datatype:
    """A type of ``size`` bytes: before MPI 4 (Open MPI 5) a count ends at 2³¹."""
    blocks, rest = divmod(size, BLOCK)
    block = MPI.BYTE.Create_contiguous(BLOCK)
    return MPI.Datatype.Create_struct([blocks, rest], [0, blocks * BLOCK], [block, MPI.BYTE]).Commit()


def as_numbers(tensor: Tensor) -> list:
    """A contiguous tensor as numbers to reduce. The caller keeps the tensor alive."""
    return [memory(tensor), _NUMBER_TYPES[tensor.dtype]]


def reducible(tensor: Tensor) -> Tensor:
    """A contiguous tensor MPI can reduce: the tensor itself, or a wider copy for 16 and 8 bits.

    Such floats have no MPI type; sums of such integers end at the largest one in Open MPI, and do not go round.
    """
    if tensor.dtype not in _NUMBER_TYPES:
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"the mpi backend cannot reduce {tensor.dtype} tensors")
        return tensor.float().contiguous()
    return (tensor.int() if tensor.dtype in _NARROW else tensor).contiguous()


class Reduction(NamedTuple):
    """How one value is made of one from each rank."""

    of_numbers: MPI.Op
    of_bools: MPI.Op
    of_tensors: Callable[..., Tensor]
    averages: bool = False
    factor: Any = None  # every rank's values are multiplied by it first

    def by_mpi(self, dtype: torch.dtype) -> MPI.Op:
        """MPI's operation; what AVG and PREMUL_SUM do to a sum is done before and after it."""
        return self.of_bools if dtype == torch.bool else self.of_numbers

    def prepare(self, tensor: Tensor) -> Tensor:
        """The tensor, or a new one, multiplied by the factor."""
        return tensor if self.factor is None else tensor * self.factor

    def finish(self, total: Tensor, size: int) -> None:
        """Divide a sum over ``size`` ranks in place if that is asked for; integers are truncated, as NCCL does."""
        if self.averages:
            total.div_(size, rounding_mode=None if total.is_floating_point() or total.is_complex() else "trunc")

    def combine(self, parts: list[Tensor], result: Tensor, scratch: Tensor) -> None:
        """Reduce ``parts`` from the first to the last; 16- and 8-bit floats as float32.

        Args:
            result: where to; it may be one of the parts.
            scratch: may be overwritten meanwhile; it may be the first or the second part.
        """
        if result.dtype not in _NUMBER_TYPES:
            parts = [part.float() for part in parts]
            scratch = parts[0]
        total = parts[0]
        for part in parts[1:]:
            last = part is parts[-1] and scratch.dtype == result.dtype
            total = self.of_tensors(total, part, out=result if last else scratch)
        self.finish(total, len(parts))
        if total is not result:
            result.copy_(total)


_REDUCTIONS = {  # by the value of torch's constant: a ReduceOp does not hash in every torch, and is slow to compare
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
    """What ``op`` asks for."""
    kind = cast(Any, op).op.value
    found = _REDUCTIONS.get(kind)
    if found is None:
        raise ValueError(f"the mpi backend does not support {op}")
    if kind == ReduceOp.PREMUL_SUM.value:
        _, factor = cast(Any, op).__getstate__()
        return found._replace(factor=factor)
    return found


def combines(dtype: torch.dtype) -> bool:
    """Can ``Reduction.combine`` reduce this dtype?"""
    return dtype not in _ONLY_MPI
