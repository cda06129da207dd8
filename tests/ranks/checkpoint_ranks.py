"""What the ranks of test_checkpoint.py do, and the state that they save: values that follow from the name alone."""

import os
import resource
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fira.checkpoint.shards import Checkpoint, TensorShard, find, newest_valid, save
from fira.errors import UserError

SHAPES = {
    "embedding.weight": (11, 3),
    "layers.0.moe.experts.w1": (8, 4, 5),
    "layers.1.norm.weight": (7,),
    "exp_avg/layers.0.moe.experts.w1": (8, 4, 5),
    "step": (),
}
OPTIMIZER = ("exp_avg/layers.0.moe.experts.w1", "step")
WHOLE = {"layers.1.norm.weight": 1, "step": 0}  # tensors that one rank owns alone, and which


def value(name: str, salt: int = 0) -> torch.Tensor:
    """The tensor called `name`; another salt gives other numbers."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + salt)
    return torch.randn(SHAPES[name], generator=generator)


def owned(names: list[str], salt: int, rank: int, world: int) -> list[TensorShard]:
    """This rank's shards: uneven slices of the rows, none at all where there are too few, whole ones on their owner."""
    shards = []
    for name in names:
        full = value(name, salt)
        if name in WHOLE:
            if rank == WHOLE[name] % world:
                shards.append(TensorShard(name, full, 0, tuple(full.shape)))
            continue
        cuts = [full.shape[0] * part * part // (world * world) for part in range(world + 1)]
        shards.append(TensorShard(name, full[cuts[rank] : cuts[rank + 1]], cuts[rank], tuple(full.shape)))
    return shards


def save_state(root: str, step: int, salt: int = 0, keep: int = 2) -> str:
    """Save SHAPES, spread over the ranks there are."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    weights = owned([name for name in SHAPES if name not in OPTIMIZER], salt, rank, world)
    optimizer = owned(list(OPTIMIZER), salt, rank, world)
    documents = {"config": {"hidden": 4, "salt": salt}}
    files = {"tokenizer.json": b'{"version": "1.0"}'}
    return str(save(Path(root), step, weights, optimizer, documents, files, {"ranks": world}, keep))


def matches(checkpoint: Checkpoint, salt: int) -> bool:
    """Whether the checkpoint holds what `save_state` saved, and nothing else."""
    return (
        checkpoint.names() == sorted(SHAPES)
        and checkpoint.document("config") == {"hidden": 4, "salt": salt}
        and checkpoint.file("tokenizer.json") == b'{"version": "1.0"}'
        and all(checkpoint.shape(name) == shape for name, shape in SHAPES.items())
        and all(torch.equal(checkpoint.read(name), value(name, salt)) for name in SHAPES)
    )


def ranges_match(checkpoint: Checkpoint) -> bool:
    """Whether every range of rows of every tensor is what it is in the whole one."""
    ranges = [(n, i, j) for n, shape in SHAPES.items() if shape for j in range(shape[0] + 1) for i in range(j + 1)]
    return all(torch.equal(checkpoint.read(name, i, j), value(name)[i:j]) for name, i, j in ranges)


def read_state(path: str) -> bool:
    """Open what `path` means and compare all of it."""
    checkpoint = Checkpoint.open(find(path))
    return matches(checkpoint, salt=0) and ranges_match(checkpoint)


def refusal(folder: str) -> str:
    """What `Checkpoint.open` says against `folder`."""
    try:
        Checkpoint.open(folder)
    except UserError as error:
        return str(error)
    return ""


def newest_step(root: str) -> int | None:
    """The step of the newest whole checkpoint."""
    checkpoint = newest_valid(Path(root))
    return checkpoint.step if checkpoint else None


def save_without_room(root: str, step: int, rank: int, limit: int) -> str:
    """Save while `rank` may not write a file above `limit` bytes; what every rank is told."""
    if not dist.is_initialized() or dist.get_rank() == rank:
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        save_state(root, step)
    except UserError as error:
        return str(error)
    finally:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return ""


def overlap(root: str) -> str:
    """What every rank is told where all pass the same rows."""
    tensor = value("embedding.weight")
    try:
        save(Path(root), 1, [TensorShard("embedding.weight", tensor, 0, tuple(tensor.shape))], [], {}, {}, {})
    except ValueError as error:
        return str(error)
    return ""


def everything(root: str) -> dict[str, Any]:
    """What each rank sees of saving and reading, of damage and of a full disk: one start for several tests."""
    folder = Path(save_state(f"{root}/whole", 3))
    seen: dict[str, Any] = {"folder": str(folder), "read": read_state(f"{root}/whole")}
    seen["overlap"] = overlap(f"{root}/overlap")

    for step in (50, 100):
        save_state(f"{root}/damaged", step)
    damaged = Path(root, "damaged", "step-000100", "model-00003-of-00004.safetensors")
    if dist.get_rank() == 0:
        os.truncate(damaged, 10)
    dist.barrier()
    seen["refusal"], seen["damaged"] = refusal(str(damaged.parent)), str(damaged)
    seen["newest"] = newest_step(f"{root}/damaged")

    save_state(f"{root}/full", 50)
    seen["full"] = save_without_room(f"{root}/full", 100, rank=1, limit=100)
    seen["newest after full"] = newest_step(f"{root}/full")
    return seen
