"""Tensors as MPI sees them: an address, a count and a datatype."""

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

_REDUCTIONS = [  # (torch's, MPI's for numbers, MPI's for bool); a ReduceOp does not hash, but compares
    (ReduceOp.SUM, MPI.SUM, MPI.LOR),
    (ReduceOp.AVG, MPI.SUM, MPI.LOR),
    (ReduceOp.MIN, MPI.MIN, MPI.LAND),
    (ReduceOp.MAX, MPI.MAX, MPI.LOR),
    (ReduceOp.PRODUCT, MPI.PROD, MPI.LAND),
    (ReduceOp.BAND, MPI.BAND, MPI.LAND),
    (ReduceOp.BOR, MPI.BOR, MPI.LOR),
    (ReduceOp.BXOR, MPI.BXOR, MPI.LXOR),
]


def as_bytes(tensor: Tensor) -> list:
    """A contiguous tensor as raw bytes: any dtype crosses this way. The caller keeps the tensor alive."""
    return [MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes), MPI.BYTE]


def as_numbers(tensor: Tensor) -> list:
    """A contiguous tensor as numbers to reduce. The caller keeps the tensor alive."""
    memory = MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes)
    return [memory, _NUMBER_TYPES[tensor.dtype]]


def reducible(tensor: Tensor) -> Tensor:
    """A contiguous tensor MPI can reduce: the tensor itself, or a copy; 16- and 8-bit floats are reduced in float32."""
    if tensor.dtype not in _NUMBER_TYPES:
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"the mpi backend cannot reduce {tensor.dtype} tensors")
        return tensor.float().contiguous()
    return tensor.contiguous()


def reduction(op: ReduceOp, dtype: torch.dtype) -> MPI.Op:
    """The MPI operation for ``op``; AVG is a sum, which ``average`` divides afterwards."""
    for torch_op, of_numbers, of_bools in _REDUCTIONS:
        if op == torch_op:
            return of_bools if dtype == torch.bool else of_numbers
    raise ValueError(f"the mpi backend does not support {op}")


def average(tensor: Tensor, op: ReduceOp, size: int) -> None:
    """Divide a sum over ``size`` ranks in place if ``op`` is AVG; integers are truncated, as NCCL does."""
    if op == ReduceOp.AVG:
        tensor.div_(size, rounding_mode=None if tensor.is_floating_point() or tensor.is_complex() else "trunc")
