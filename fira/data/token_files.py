"""Files of token ids from other programs, memory-mapped.

x.npy              a one-dimensional array of integers
x.bin              llm.c and modded-nanogpt: 256 int32, which are a magic number, a version, the number of tokens,
                   and zeros; then the tokens
x.bin, x.ds        only tokens, with an index, see `document_index`
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from fira.data.document_index import index_of, mapped, open_index
from fira.errors import UserError
from fira.files import one_line

SUFFIXES = (".npy", ".bin", ".ds")
HEADER = 1024  # bytes of the header of llm.c
DTYPES: dict[tuple[int, int], np.dtype[Any]] = {  # by magic number and version
    (20240520, 1): np.dtype("<u2"),  # GPT-2
    (20240801, 7): np.dtype("<u4"),  # Llama 3
}


def map_tokens(path: Path) -> np.ndarray:
    """Memory-map the tokens of a file. Raises UserError if it is not a complete file of a known format."""
    if path.suffix.lower() == ".npy":
        return _npy(path)
    if index := index_of(path):
        return mapped(path, open_index(path, index).dtype, 0)
    if path.suffix.lower() == ".ds":
        raise UserError(f"{path}: no {path.name}.index, which datatrove writes next to it; copy both files")
    return _llm_c(path)


def _llm_c(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        magic, version, count = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
    if (dtype := DTYPES.get((magic, version))) is None:
        raise UserError(
            f"{path}: no header of llm.c, and no {path.stem}.idx of Megatron-LM; save tokens without a header, such as "
            "those of nanoGPT, with np.save as *_train_*.npy and *_val_*.npy"
        )
    size, expected = path.stat().st_size, HEADER + count * dtype.itemsize
    if count < 0 or size != expected:
        raise UserError(f"{path}: {size} bytes instead of {expected}, incomplete; copy or download it again")
    return mapped(path, dtype, HEADER, count)


def _npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
            shape, _, dtype = read_header(file)
            offset = file.tell()
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python, and raises what the parser raises
        raise UserError(f"{path}: not a complete .npy file ({one_line(error)}); download it again") from None
    if len(shape) != 1 or dtype.kind not in "ui":
        raise UserError(f"{path}: holds {dtype} {shape}, not a 1-d array of token ids; give other shards")
    size = offset + shape[0] * dtype.itemsize
    if path.stat().st_size != size:
        raise UserError(f"{path}: not a complete .npy file ({path.stat().st_size} bytes of {size}); download it again")
    return np.memmap(path, dtype, "r", offset, shape)
