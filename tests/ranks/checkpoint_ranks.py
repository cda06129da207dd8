"""Functions that each rank of the checkpoint tests runs, and the tensors that they save."""

import logging
import os
import resource
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fira.checkpoint import shards
from fira.checkpoint.manifest import FileRecord
from fira.checkpoint.shard_index import TensorShard
from fira.checkpoint.shards import Checkpoint, newest_valid
from fira.checkpoint.step_folders import find
from fira.checkpoint.tensor_file import TensorFile
from fira.checkpoint.writer import CheckpointWriter
from fira.errors import UserError
from tests.saving import save_checkpoint

SHAPES = {
    "embedding.weight": (11, 3),
    "layers.0.moe.experts.w1": (8, 4, 5),
    "layers.1.norm.weight": (7,),
    "exp_avg/layers.0.moe.experts.w1": (8, 4, 5),
    "step": (),
}
OPTIMIZER = ("exp_avg/layers.0.moe.experts.w1", "step")
UNSHARDED = {"layers.1.norm.weight": 1, "step": 0}  # the rank that owns each unsharded tensor


def value(name: str, salt: int = 0) -> torch.Tensor:
    """Return the tensor `name`, with random values that depend on the name and the salt."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + salt)
    return torch.randn(SHAPES[name], generator=generator)


def owned(names: list[str], salt: int, rank: int, world: int) -> list[TensorShard]:
    """Return this rank's shards: uneven, possibly empty slices of the rows, and the unsharded tensors that it owns."""
    found = []
    for name in names:
        full = value(name, salt)
        if name in UNSHARDED:
            if rank == UNSHARDED[name] % world:
                found.append(TensorShard(name, full, 0, tuple(full.shape)))
            continue
        cuts = [full.shape[0] * part * part // (world * world) for part in range(world + 1)]
        found.append(TensorShard(name, full[cuts[rank] : cuts[rank + 1]], cuts[rank], tuple(full.shape)))
    return found


def save_state(root: str, step: int, salt: int = 0, keep: int = 2) -> str:
    """Save the tensors of SHAPES, sharded over all ranks."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    weights = owned([name for name in SHAPES if name not in OPTIMIZER], salt, rank, world)
    optimizer = owned(list(OPTIMIZER), salt, rank, world)
    documents = {"config": {"hidden": 4, "salt": salt}}
    files = {"tokenizer.json": b'{"version": "1.0"}'}
    return str(save_checkpoint(Path(root), step, weights, optimizer, documents, files, {"ranks": world}, keep))


def matches(checkpoint: Checkpoint, salt: int) -> bool:
    """Return whether the checkpoint contains exactly what `save_state` saves."""
    return (
        checkpoint.document("index")["tensors"].keys() == SHAPES.keys()
        and checkpoint.document("config") == {"hidden": 4, "salt": salt}
        and checkpoint.file("tokenizer.json") == b'{"version": "1.0"}'
        and all(checkpoint.shape(name) == shape for name, shape in SHAPES.items())
        and all(torch.equal(checkpoint.read(name), value(name, salt)) for name in SHAPES)
    )


def ranges_match(checkpoint: Checkpoint) -> bool:
    """Return whether every range of rows of every tensor equals the slice of the tensor."""
    ranges = [(n, i, j) for n, shape in SHAPES.items() if shape for j in range(shape[0] + 1) for i in range(j + 1)]
    return all(torch.equal(checkpoint.read(name, i, j), value(name)[i:j]) for name, i, j in ranges)


def read_state(path: str) -> bool:
    """Open the checkpoint at `path`; return whether all tensors and all ranges of rows are equal."""
    checkpoint = Checkpoint.open(find(path))
    return matches(checkpoint, salt=0) and ranges_match(checkpoint)


def open_error(folder: str) -> str:
    """Return the message of the UserError that `Checkpoint.open` raises, or an empty string."""
    try:
        Checkpoint.open(folder)
    except UserError as error:
        return str(error)
    return ""


def newest_step(root: str) -> int | None:
    """Return the step of the newest undamaged checkpoint."""
    checkpoint = newest_valid(Path(root))
    return checkpoint.step if checkpoint else None


def save_without_room(root: str, step: int, rank: int, limit: int) -> str:
    """Save while `rank` cannot write more than `limit` bytes per file, and return the error message of this rank."""
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


def save_forever(root: str) -> None:
    """Save tensors that contain the number of their step, from the step after the newest checkpoint on."""
    writer, step = CheckpointWriter(Path(root), keep=2), newest_step(root) or 0
    while True:
        step += 1
        shards = [TensorShard(name, torch.full((50_000,), float(step)), 0, (50_000,)) for name in ("x", "y")]
        writer.start(step, shards[:1], shards[1:], {"config": {"step": step}}, {}, {})
        while writer.step is not None:
            writer.advance(writer.finished())


def save_while_training(root: str, failing: int | None) -> dict[str, Any]:
    """Save in steps that reduce a number over all ranks, with ranks of different speed.

    failing: a rank that cannot write. Returns the error, the reductions until the save was complete or failed, and how
    many ranks had not completed a phase at the most.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    writer, tensor, behind, steps = CheckpointWriter(Path(root), keep=2), torch.ones(2), 0.0, 0
    write = TensorFile.write

    def slow_write(file: TensorFile, path: Path) -> FileRecord:
        time.sleep(0.1 * rank)
        if rank == failing:
            raise OSError(28, "No space left on device")
        return write(file, path)

    TensorFile.write = slow_write  # type: ignore[method-assign]
    try:
        writer.start(7, [TensorShard("x", tensor, 2 * rank, (2 * world,))], [], {}, {}, {})
        tensor.zero_()
        while writer.step is not None:
            finished = torch.tensor([writer.finished()])
            dist.all_reduce(finished)
            steps, behind = steps + 1, max(behind, world - float(finished))
            writer.advance(float(finished))
    except UserError as error:
        return {"error": str(error), "steps": steps, "behind": behind}
    finally:
        TensorFile.write = write  # type: ignore[method-assign]
    equal = bool(Checkpoint.open(find(root)).read("x").eq(1).all())
    return {"error": "", "steps": steps, "behind": behind, "equal": equal}


def overlap_error(root: str) -> str:
    """Return the error message of this rank when all ranks pass the same rows."""
    tensor = value("embedding.weight")
    try:
        save_checkpoint(
            Path(root), 1, [TensorShard("embedding.weight", tensor, 0, tuple(tensor.shape))], [], {}, {}, {}, 2
        )
    except ValueError as error:
        return str(error)
    return ""


def run_scenarios(root: str) -> dict[str, Any]:
    """Save and read, pass overlapping shards, damage a file and fill the disk; return the results of this rank."""
    folder = Path(save_state(f"{root}/complete", 3))
    results: dict[str, Any] = {"folder": str(folder), "read": read_state(f"{root}/complete")}
    results["overlap"] = overlap_error(f"{root}/overlap")

    for step in (50, 100):
        save_state(f"{root}/damaged", step)
    damaged = Path(root, "damaged", "step-000100", "model-00003-of-00004.safetensors")
    if dist.get_rank() == 0:
        os.truncate(damaged, 10)
    dist.barrier()
    results["error"], results["damaged"] = open_error(str(damaged.parent)), str(damaged)
    results["warnings"] = []
    handler = logging.Handler()
    handler.emit = lambda record: results["warnings"].append(record.getMessage())  # type: ignore[method-assign]
    shards.logger.addHandler(handler)
    results["newest"] = newest_step(f"{root}/damaged")
    shards.logger.removeHandler(handler)

    results["background"] = [save_while_training(f"{root}/background", failing) for failing in (None, 3)]
    results["background folders"] = sorted(path.name for path in Path(root, "background").iterdir())

    save_state(f"{root}/full", 50)
    results["full"] = save_without_room(f"{root}/full", 100, rank=1, limit=100)
    results["newest after full"] = newest_step(f"{root}/full")
    return results
