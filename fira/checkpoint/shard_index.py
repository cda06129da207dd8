"""The shards of tensors that ranks save, and the index of the files that store them.

rank r   TensorShard(name, tensor = rows [start, start + rows) of the global tensor)  →  model-*.safetensors
index    name → shape, dtype, and for each file the rows that it stores
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fira.checkpoint.manifest import StoredRows, TensorEntry, encode_index


@dataclass(frozen=True)
class TensorShard:
    """The rows of a tensor that a rank owns.

    name: global, independent of the layout (`layers.3.moe.experts.w1`, `exp_avg/layers.3.moe.experts.w1`).
    tensor: the rows, on any device. start: the index of the first row in dimension 0. shape: the global shape.
    An unsharded tensor has start 0 and shape `tensor.shape`; a 0-d tensor counts as one row.
    """

    name: str
    tensor: Tensor
    start: int
    shape: tuple[int, ...]


class Description(NamedTuple):
    """A shard without its numbers. shape: of the global tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    rows: int


def describe(shard: TensorShard) -> Description:
    """Return what the index states about a shard. Raises ValueError if it does not fit the global shape."""
    rows = shard.tensor.shape[0] if shard.tensor.dim() else 1
    if tuple(shard.tensor.shape[1:]) != tuple(shard.shape[1:]) or shard.tensor.dim() != len(shard.shape):
        raise ValueError(
            f"{shard.name}: shape {tuple(shard.tensor.shape)} does not fit the global shape {tuple(shard.shape)}"
        )
    dtype = str(shard.tensor.dtype).removeprefix("torch.")
    return Description(shard.name, dtype, tuple(shard.shape), shard.start, rows)


class FileIndex:
    """The names of the files of all ranks, and the index of the tensors that they store.

    described: [rank][kind] shards. names: [kind][rank] of the ranks that have tensors of the kind, such as
    model-00001-of-00004.safetensors. Raises ValueError unless each row is passed exactly once.
    """

    def __init__(self, described: Sequence[dict[str, list[Description]]]) -> None:
        self.described = described
        self.names = {kind: _file_names(kind, [len(kinds[kind]) for kinds in described]) for kind in described[0]}
        self.text = encode_index(_entries(described, self.names))


def _file_names(kind: str, counts: list[int]) -> dict[int, str]:
    writers = [rank for rank, count in enumerate(counts) if count]
    return {rank: f"{kind}-{i:05d}-of-{len(writers):05d}.safetensors" for i, rank in enumerate(writers, 1)}


def _entries(
    described: Sequence[dict[str, list[Description]]], names: dict[str, dict[int, str]]
) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for rank, kinds in enumerate(described):
        for kind, shards in kinds.items():
            for name, dtype, shape, start, rows in shards:
                entry = entries.setdefault(name, TensorEntry(shape, dtype, ()))
                stored = StoredRows(names[kind][rank], start, rows)
                if (entry.shape, entry.dtype) != (shape, dtype) or stored.file in (part.file for part in entry.parts):
                    raise ValueError(f"{name}: rank {rank} passes it twice, or with a different shape or dtype")
                entries[name] = TensorEntry(shape, dtype, (*entry.parts, stored))
    for name, entry in entries.items():
        if not entry.is_complete():
            raise ValueError(f"{name}: the shards of all ranks do not form the tensor: {entry}")
    return entries
