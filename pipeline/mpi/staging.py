"""CUDA tensors over MPI where NCCL cannot: straight from the device if MPI reads it, else by way of the host.

Staged, an operation's inputs are copied to pinned host memory, moved there as ever, and its outputs copied back. The
copies run on streams of their own, one for each direction. What works in place treats every element alike, so it goes
in pieces: while MPI moves one, the next comes from the device, and the one before returns to it.

Copies begin behind what the caller's stream has been given at the time of the call. An operation is over when its
outputs are on the device, so from then on any stream may use them, and any memory may be reused.
"""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.mpi.work import Steps

PIECE_BYTES = 4 * 2**20
Moves = Callable[[list[Tensor], list[Tensor]], Steps]  # inputs, outputs → an operation's steps
Done = Callable[[], bool]


def on_device(tensor: Tensor) -> bool:
    """Is this memory that the CPU does not read?"""
    return tensor.is_cuda and tensor.layout == torch.strided


class Lane:
    """Copies of one direction, one after the other, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def follow(self) -> None:
        """Let what is copied from now on wait for what the caller's stream has been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, target: Tensor, source: Tensor) -> Done:
        """Begin a copy. Returns a function that says whether it is done."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            for tensor in (target, source):
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)  # its memory is not reused before
            return self._stream.record_event().query


@functools.cache
def lanes(device: torch.device) -> tuple[Lane, Lane]:
    """From a device to the host, and back."""
    return Lane(device), Lane(device)


def staged(moves: Moves, inputs: list[Tensor], outputs: list[Tensor], at_once: bool = False) -> Steps:
    """The steps of an operation on tensors of one device. It works in place if both lists are the same one.

    Args:
        at_once: its messages have to leave before the call returns, because they are told apart by their order.
    """
    to_host, to_device = lanes((inputs or outputs)[0].device)
    sources, targets = [tensor.detach() for tensor in inputs], [tensor.detach() for tensor in outputs]
    rows = [tensor.contiguous().view(-1) for tensor in sources] if inputs is outputs else []
    to_host.follow()
    to_device.follow()
    if rows:
        pieces = [piece for row in rows for piece in row.split(max(1, PIECE_BYTES // row.element_size()))]
        hosts = [_host(piece) for piece in pieces]
        returned = []
        for piece, host, arrived in zip(pieces, hosts, _copies(to_host, hosts, pieces), strict=True):
            yield arrived
            yield from moves([host], [host])
            returned.append(to_device.copy(piece, host))
        gaps = [(tensor, row) for tensor, row in zip(targets, rows, strict=True) if not tensor.is_contiguous()]
        returned += [to_device.copy(tensor, row.view(tensor.shape)) for tensor, row in gaps]
    else:
        sent, received = [_host(tensor) for tensor in sources], [_host(tensor) for tensor in targets]
        arrivals = _copies(to_host, sent, sources)
        if at_once:
            _await(arrivals)
        yield from arrivals
        yield from moves(sent, received)
        returned = _copies(to_device, targets, received)
    yield from returned


def straight(moves: Moves, inputs: list[Tensor], outputs: list[Tensor]) -> Steps:
    """The steps of a message that MPI reads from, or writes to, device memory itself."""
    if not all(tensor.is_contiguous() for tensor in (*inputs, *outputs)):
        return staged(moves, inputs, outputs, at_once=True)
    device = (inputs or outputs)[0].device
    _await([torch.cuda.current_stream(device).record_event().query])
    return moves([tensor.detach() for tensor in inputs], [tensor.detach() for tensor in outputs])


def _copies(lane: Lane, targets: list[Tensor], sources: list[Tensor]) -> list[Done]:
    return [lane.copy(target, source) for target, source in zip(targets, sources, strict=True)]


def _await(copies: list[Done]) -> None:
    while not all(done() for done in copies):
        time.sleep(20e-6)


def _host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
