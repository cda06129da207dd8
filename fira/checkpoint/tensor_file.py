"""A safetensors file in memory: tensors are copied into it in the training thread, and another thread writes it.

    8 bytes   length of the header, little-endian
    header    JSON: dtype, shape and position of every tensor, padded with spaces to a multiple of 8 bytes
    data      the tensors by decreasing element size, so that each is aligned; equal sizes by dtype, then by name

The bytes are those of `safetensors.torch.save_file`, which reads the tensors while it writes and holds Python's
interpreter lock in some versions. Here the tensors may change as soon as they are copied, and hashing and writing
release the lock.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fira.checkpoint.manifest import FileRecord
from fira.files import write

# Names of dtypes in the header, in the order of the data.
DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 2**18  # elements checked at a time, which stay in the CPU cache


class TensorFile:
    """A safetensors file whose memory is reused for the next copy, since first access to new pages is slow."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._size = 0
        self._views: dict[str, Tensor] = {}  # into the buffer, by name
        self._copies: list[torch.cuda.Event] = []  # recorded after the copies from each GPU

    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the content by copies of tensors on any devices.

        Copies from GPUs are asynchronous: they go to pinned memory, ordered after the work of the current stream.
        """
        header, positions = _layout(tensors)
        gpus = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
        self._size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
        if len(self._buffer) < self._size:
            self._buffer = torch.empty(self._size, dtype=torch.uint8, pin_memory=bool(gpus))
        self._buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._views = {}
        for name, tensor in tensors.items():
            begin = len(header) + positions[name]
            view = self._buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self._views[name] = view.copy_(tensor.detach(), non_blocking=bool(gpus))
        self._copies = [_record(gpu) for gpu in gpus]

    def first_not_finite(self) -> str | None:
        """Return the name of the first tensor, in the order of `copy_from`, with a number that is not finite."""
        self._wait()
        for name, view in self._views.items():
            if view.is_floating_point():
                flat = (view.float() if view.dtype == torch.bfloat16 else view).numpy().reshape(-1)
                if not all(np.isfinite(flat[i : i + CHUNK]).all() for i in range(0, flat.size, CHUNK)):
                    return name
        return None

    def write(self, path: Path) -> FileRecord:
        """Write the file, flush it to the disk, and return its record. Raises UserError if it cannot be written."""
        self._wait()
        content = self._buffer[: self._size].numpy().data
        write(path, content)
        return FileRecord.of(content)

    def _wait(self) -> None:
        for copy in self._copies:
            copy.synchronize()


def _record(gpu: torch.device) -> torch.cuda.Event:
    """Record an event on the current stream of a GPU; a thread that waits for it sleeps."""
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(gpu))
    return event


def _layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Return the length and the header of the file, as bytes, and the position of each tensor in its data."""
    order = list(DTYPE_NAMES)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    positions, end = {}, 0
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
        tensor = tensors[name]
        positions[name], end = end, end + math.prod(tensor.shape) * tensor.itemsize
        offsets = [positions[name], end]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, positions
