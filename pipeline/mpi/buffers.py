"""Tensors as MPI sees them: an address, a count and a datatype."""

import functools
from typing import Any, cast

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

_REDUCTIONS = [  # (torch's, MPI's for numbers, MPI's for bool, ours); a ReduceOp does not hash, but compares
    (ReduceOp.SUM, MPI.SUM, MPI.LOR, torch.add),
    (ReduceOp.AVG, MPI.SUM, MPI.LOR, torch.add),
    (ReduceOp.PREMUL_SUM, MPI.SUM, MPI.LOR, torch.add),
    (ReduceOp.MIN, MPI.MIN, MPI.LAND, torch.minimum),
    (ReduceOp.MAX, MPI.MAX, MPI.LOR, torch.maximum),
    (ReduceOp.PRODUCT, MPI.PROD, MPI.LAND, torch.mul),
    (ReduceOp.BAND, MPI.BAND, MPI.LAND, torch.bitwise_and),
    (ReduceOp.BOR, MPI.BOR, MPI.LOR, torch.bitwise_or),
    (ReduceOp.BXOR, MPI.BXOR, MPI.LXOR, torch.bitwise_xor),
]
BLOCK = 2**30
_NARROW = (torch.int8, torch.uint8, torch.int16, torch.uint16)
_ONLY_MPI = (torch.uint16, torch.uint32, torch.uint64)  # torch has next to no arithmetic for them


def as_bytes(tensor: Tensor) -> list:
    """A contiguous tensor as raw bytes: any dtype crosses this way. The caller keeps the tensor alive."""
    memory = MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes)
    return [memory, MPI.BYTE] if tensor.nbytes < BLOCK else [memory, 1, _huge(tensor.nbytes)]


@functools.cache
def _huge(size: int) -> MPI.Datatype:
    """A type of ``size`` bytes: before MPI 4 (Open MPI 5) a count ends at 2³¹."""
    blocks, rest = divmod(size, BLOCK)
    block = MPI.BYTE.Create_contiguous(BLOCK)
    return MPI.Datatype.Create_struct([blocks, rest], [0, blocks * BLOCK], [block, MPI.BYTE]).Commit()


def as_numbers(tensor: Tensor) -> list:
    """A contiguous tensor as numbers to reduce. The caller keeps the tensor alive."""
    memory = MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes)
    return [memory, _NUMBER_TYPES[tensor.dtype]]


def reducible(tensor: Tensor) -> Tensor:
    """A contiguous tensor MPI can reduce: the tensor itself, or a wider copy for 16 and 8 bits.

    Such floats have no MPI type; sums of such integers end at the largest one in Open MPI, and do not go round.
    """
    if tensor.dtype not in _NUMBER_TYPES:
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"the mpi backend cannot reduce {tensor.dtype} tensors")
        return tensor.float().contiguous()
    return (tensor.int() if tensor.dtype in _NARROW else tensor).contiguous()


def reduction(op: ReduceOp, dtype: torch.dtype) -> MPI.Op:
    """The MPI operation for ``op``; what AVG and PREMUL_SUM do to a sum is done before and after it."""
    _, of_numbers, of_bools, _ = _reduction(op)
    return of_bools if dtype == torch.bool else of_numbers


def combines(dtype: torch.dtype) -> bool:
    """Can ``combine`` reduce this dtype?"""
    return dtype not in _ONLY_MPI


def combine(parts: list[Tensor], op: ReduceOp) -> Tensor:
    """A new tensor, the reduction of ``parts`` from the first to the last; 16- and 8-bit floats give float32."""
    *_, function = _reduction(op)
    wide = parts[0].dtype if parts[0].dtype in _NUMBER_TYPES else torch.float32
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        function(total, part.to(wide), out=total)
    return total


def _reduction(op: ReduceOp) -> tuple:
    for row in _REDUCTIONS:
        if op == row[0]:
            return row
    raise ValueError(f"the mpi backend does not support {op}")


def premultiplied(tensor: Tensor, op: ReduceOp) -> Tensor:
    """The tensor, or for PREMUL_SUM a new one, multiplied by the operation's factor."""
    if op != ReduceOp.PREMUL_SUM:
        return tensor
    _, factor = cast(Any, op).__getstate__()
    return tensor * factor


def average(tensor: Tensor, op: ReduceOp, size: int) -> None:
    """Divide a sum over ``size`` ranks in place if ``op`` is AVG; integers are truncated, as NCCL does."""
    if op == ReduceOp.AVG:
        tensor.div_(size, rounding_mode=None if tensor.is_floating_point() or tensor.is_complex() else "trunc")
