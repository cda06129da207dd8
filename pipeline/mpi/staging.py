"""CUDA tensors over MPI where NCCL is not available: directly if MPI can access device memory, otherwise via the host.

A staged operation copies its inputs to pinned host memory, runs there, and copies its outputs back. The copies run on
two streams, one per direction. An in-place operation treats all elements alike, so it is split into pieces whose copies
and messages overlap:

    to host      piece 1 | piece 2 | piece 3 |
    MPI                  | piece 1 | piece 2 | piece 3 |
    to device            |         | piece 1 | piece 2 | piece 3

Copies start after the work that the caller's stream contains at the time of the call, also if the operation is queued
behind another one and another thread starts its steps. An operation ends when its outputs are on the device; from then
on, any stream may use them and all memory may be reused.
"""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.mpi.work import Steps

PIECE_BYTES = 4 * 2**20
Moves = Callable[[list[Tensor], list[Tensor]], Steps]  # (inputs, outputs) → steps of an operation
Done = Callable[[], bool]


def on_device(tensor: Tensor) -> bool:
    """Return whether the CPU cannot read the tensor's memory."""
    return tensor.is_cuda and tensor.layout == torch.strided


class Lane:
    """Copies of one direction in order on a separate stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def follow(self, event: torch.cuda.Event) -> None:
        """Make subsequent copies wait for an event."""
        self._stream.wait_event(event)

    def copy(self, target: Tensor, source: Tensor) -> Done:
        """Start a copy. Return a function that returns whether the copy has finished."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            for tensor in (target, source):
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)  # its memory is not reused before the copy has finished
            return self._stream.record_event().query


@functools.cache
def lanes(device: torch.device) -> tuple[Lane, Lane]:
    """Return the lanes from a device to the host and back."""
    return Lane(device), Lane(device)


def current_work(device: torch.device) -> torch.cuda.Event:
    """Return an event at the end of the work that the caller's stream contains now."""
    return torch.cuda.current_stream(device).record_event()


def staged(moves: Moves, inputs: list[Tensor], outputs: list[Tensor], send_now: bool = False) -> Steps:
    """Return the steps of an operation on tensors of one device via the host.

    Args:
        moves: returns the steps on host tensors.
        inputs: input tensors.
        outputs: output tensors; the same list as ``inputs`` if the operation works in place.
        send_now: whether the messages must be sent before the call returns, because their order identifies them.
    """
    device = (inputs or outputs)[0].device
    sources, targets = [tensor.detach() for tensor in inputs], [tensor.detach() for tensor in outputs]
    if inputs is outputs:
        rows = [tensor.contiguous().view(-1) for tensor in sources]
        return _in_place(moves, targets, rows, *lanes(device), current_work(device))
    return _out_of_place(moves, sources, targets, *lanes(device), current_work(device), send_now)


def _in_place(
    moves: Moves, targets: list[Tensor], rows: list[Tensor], to_host: Lane, to_device: Lane, called: torch.cuda.Event
) -> Steps:
    """The steps of an operation that works in place. rows: the targets' elements, contiguous and flat."""
    to_host.follow(called)
    to_device.follow(called)
    pieces = [piece for row in rows for piece in row.split(max(1, PIECE_BYTES // row.element_size()))]
    hosts = [_host(piece) for piece in pieces]
    returned = []
    for piece, host, arrived in zip(pieces, hosts, _copies(to_host, hosts, pieces), strict=True):
        yield arrived
        yield from moves([host], [host])
        returned.append(to_device.copy(piece, host))
    gaps = [(tensor, row) for tensor, row in zip(targets, rows, strict=True) if not tensor.is_contiguous()]
    returned += [to_device.copy(tensor, row.view(tensor.shape)) for tensor, row in gaps]
    yield from returned


def _out_of_place(
    moves: Moves,
    sources: list[Tensor],
    targets: list[Tensor],
    to_host: Lane,
    to_device: Lane,
    called: torch.cuda.Event,
    send_now: bool,
) -> Steps:
    to_host.follow(called)
    to_device.follow(called)
    sent, received = [_host(tensor) for tensor in sources], [_host(tensor) for tensor in targets]
    arrivals = _copies(to_host, sent, sources)
    if send_now:
        _await(arrivals)
    yield from arrivals
    yield from moves(sent, received)
    yield from _copies(to_device, targets, received)


def direct(moves: Moves, inputs: list[Tensor], outputs: list[Tensor]) -> Steps:
    """Return the steps of a message that MPI reads from, or writes to, device memory."""
    if not all(tensor.is_contiguous() for tensor in (*inputs, *outputs)):
        return staged(moves, inputs, outputs, send_now=True)
    device = (inputs or outputs)[0].device
    _await([current_work(device).query])
    return moves([tensor.detach() for tensor in inputs], [tensor.detach() for tensor in outputs])


def _copies(lane: Lane, targets: list[Tensor], sources: list[Tensor]) -> list[Done]:
    return [lane.copy(target, source) for target, source in zip(targets, sources, strict=True)]


def _await(copies: list[Done]) -> None:
    while not all(done() for done in copies):
        time.sleep(20e-6)


def _host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
