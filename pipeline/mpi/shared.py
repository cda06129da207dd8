"""Collectives of ranks on one machine, through memory that they share.

The memory has two halves, and each half a slot per rank. A collective is a row of rounds. In a round every rank writes
into its own slot, says so by counting up, waits until all have, and reads what it wants from the others' slots. Rounds
take the halves in turn: who writes round k + 2 knows from the counts of round k + 1 that all have read round k.

Data of any size go through in chunks that stay in the cache. A group's collectives must run one after the other.
"""

from collections.abc import Callable, Generator
from mmap import mmap

import torch
from mpi4py import MPI
from torch import Tensor
from torch.distributed import ReduceOp

from pipeline.mpi.buffers import combine

CHUNK = 256 * 1024  # bytes a rank writes per round
MEMORY = 16 * 2**20  # bytes of a group, about: with many ranks the chunks are smaller
SMALL = 32 * 1024  # up to here every rank adds up everything, which saves a round

# The numbers by which ranks see that they mean the same
BARRIER, BROADCAST, ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER = range(5)
Rounds = Generator[Callable[[], bool], None, None]


def cell_bytes(size: int) -> int:
    """A slot has a cell for each of ``size`` ranks and one more; a cell holds whole elements of every dtype."""
    return max(64, min(CHUNK, MEMORY // (2 * size)) // size // 64 * 64)


def memory_bytes(size: int) -> int:
    """What a group of this size needs."""
    return _header_bytes(size) + 2 * size * (size + 1) * cell_bytes(size)


def _header_bytes(size: int) -> int:
    return -(-8 * 3 * size // 4096) * 4096


class Shared:
    """One group's shared memory, as ``rank`` of ``size`` sees it; ``wake`` rouses the others."""

    def __init__(self, memory: mmap, rank: int, size: int, wake: Callable[[], None]) -> None:
        self._rank, self._size, self._wake = rank, size, wake
        self._others = [peer for peer in range(size) if peer != rank]
        self._memory, self._bytes = memory, memoryview(memory)
        self._cell = cell_bytes(size)
        self._chunk = self._cell * size
        slots = range(_header_bytes(size), memory_bytes(size), self._chunk + self._cell)
        self._starts = [slots[:size], slots[size:]]
        words = self._bytes[: _header_bytes(size)].cast("q")
        self._counts = words[:size]  # rounds each rank has written
        self._states = [words[size : 2 * size], words[2 * size : 3 * size]]  # of each half: what, how much, any more
        self._round = 0

    def barrier(self) -> Rounds:
        yield from self._rounds(BARRIER, 0, lambda number, half: False, lambda number, half: None)

    def broadcast(self, tensor: Tensor, root: int) -> Rounds:
        """The root's data into everyone's tensor."""
        data, chunk, sends = as_memory(tensor), self._chunk, self._rank == root

        def write(number: int, half: int) -> bool:
            if sends:
                self._put(half, 0, data[number * chunk : (number + 1) * chunk])
            return (number + 1) * chunk < len(data)

        def read(number: int, half: int) -> None:
            start, end = number * chunk, min((number + 1) * chunk, len(data))
            if not sends:
                data[start:end] = self._get(half, root, 0, end - start)

        yield from self._rounds(BROADCAST, len(data) * self._size + root, write, read)

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> Rounds:
        """Reduce a flat tensor in place."""
        if tensor.nbytes <= min(SMALL, self._chunk):
            yield from self._all_reduce_small(tensor, op)
            return
        combine([tensor[:0], tensor[:0]], op, tensor.new_empty(0))  # if it cannot, no rank may wait for another
        data, dtype, width = as_memory(tensor), tensor.dtype, tensor.element_size()
        cell = min(self._cell, -(-len(data) // (64 * self._size)) * 64)
        chunk = cell * self._size
        chunks = -(-len(data) // chunk)

        def piece(number: int, rank: int) -> tuple[int, int]:
            start = number * chunk + rank * cell
            return min(start, len(data)), min(start + cell, len(data))

        def write(number: int, half: int) -> bool:
            """A chunk for the others to reduce, and what was reduced here of the one before."""
            if number > 0:
                start, end = piece(number - 1, self._rank)
                self._put(half, chunk, data[start:end])
            self._put(half, 0, data[number * chunk : (number + 1) * chunk])
            return number < chunks

        def read(number: int, half: int) -> None:
            if number > 0:
                for peer in self._others:
                    start, end = piece(number - 1, peer)
                    data[start:end] = self._get(half, peer, chunk, end - start)
            start, end = piece(number, self._rank)
            if start < end:
                at = start - number * chunk
                combine(self._views(half, at, end - start, dtype), op, tensor[start // width : end // width])

        yield from self._rounds(ALL_REDUCE, len(data), write, read)

    def _all_reduce_small(self, tensor: Tensor, op: ReduceOp) -> Rounds:
        data = as_memory(tensor)

        def write(number: int, half: int) -> bool:
            self._put(half, 0, data)
            return False

        def read(number: int, half: int) -> None:
            if data:
                combine(self._views(half, 0, len(data), tensor.dtype), op, tensor)

        yield from self._rounds(ALL_REDUCE, len(data), write, read)

    def reduce_scatter(self, parts: list[Tensor], output: Tensor, op: ReduceOp) -> Rounds:
        """Into the flat ``output`` the reduction of everyone's part number ``rank``."""
        data, cell, width = [as_memory(part) for part in parts], self._cell, output.element_size()

        def write(number: int, half: int) -> bool:
            for peer, part in enumerate(data):
                self._put(half, peer * cell, part[number * cell : (number + 1) * cell])
            return (number + 1) * cell < output.nbytes

        def read(number: int, half: int) -> None:
            start, end = number * cell, min((number + 1) * cell, output.nbytes)
            if start < end:
                parts = self._views(half, self._rank * cell, end - start, output.dtype)
                combine(parts, op, output[start // width : end // width])

        yield from self._rounds(REDUCE_SCATTER, output.nbytes, write, read)

    def all_gather(self, part: Tensor, outputs: list[Tensor]) -> Rounds:
        """Everyone's part into ``outputs``, all of one size."""
        data, chunk = as_memory(part), self._chunk
        received = [as_memory(output) for output in outputs]

        def write(number: int, half: int) -> bool:
            self._put(half, 0, data[number * chunk : (number + 1) * chunk])
            return (number + 1) * chunk < len(data)

        def read(number: int, half: int) -> None:
            start, end = number * chunk, min((number + 1) * chunk, len(data))
            for peer in self._others:
                received[peer][start:end] = self._get(half, peer, 0, end - start)

        copy(part, outputs[self._rank])
        yield from self._rounds(ALL_GATHER, len(data), write, read)

    def _rounds(
        self, call: int, detail: int, write: Callable[[int, int], bool], read: Callable[[int, int], None]
    ) -> Rounds:
        """Write and read, given the round's number and its half, until nobody has more to write.

        ``call`` and ``detail``, a size, must be the same on all ranks.

        Raises:
            ValueError: the ranks called different collectives, or with different sizes.
        """
        state = (detail * 8 + call) * 2
        number, going_on = 0, True
        while going_on:
            half = self._round % 2
            states = self._states[half]
            states[self._rank] = state + write(number, half)
            self._round += 1
            self._counts[self._rank] = self._round
            self._wake()
            if not self._all_written():
                yield self._all_written
            everyones = states.tolist()
            if any(theirs >> 1 != state >> 1 for theirs in everyones):
                raise ValueError("the ranks of the group called different collectives, or with different sizes")
            read(number, half)
            going_on = any(theirs & 1 for theirs in everyones)
            number += 1

    def _all_written(self) -> bool:
        return min(self._counts.tolist()) >= self._round

    def _put(self, half: int, at: int, data: memoryview) -> None:
        start = self._starts[half][self._rank] + at
        self._bytes[start : start + len(data)] = data

    def _get(self, half: int, peer: int, at: int, length: int) -> memoryview:
        start = self._starts[half][peer] + at
        return self._bytes[start : start + length]

    def _views(self, half: int, at: int, nbytes: int, dtype: torch.dtype) -> list[Tensor]:
        """The same place in everyone's slot, as tensors."""
        number = nbytes // dtype.itemsize
        return [
            torch.frombuffer(self._memory, dtype=dtype, count=number, offset=start + at) for start in self._starts[half]
        ]


def as_memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which the caller keeps alive."""
    return memoryview(MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes))  # type: ignore[arg-type]


def copy(source: Tensor, target: Tensor) -> None:
    """One contiguous tensor's bytes to another, which may be the same one."""
    if source.nbytes != target.nbytes:
        raise ValueError(f"own part: {target.nbytes} bytes expected, {source.nbytes} given")
    if source.data_ptr() != target.data_ptr():
        as_memory(target)[:] = as_memory(source)
