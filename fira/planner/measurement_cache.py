"""Results of measurements on disk, by what they depend on."""

import hashlib
import json
import os
import platform
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from fira.data.cache import cache_folder
from pipeline.mpi import World

FORMAT = 5  # increase it when the cached values change


def machine_identity(device: torch.device, world: World) -> list[Any]:
    """What measurements depend on apart from the model: a part of the keys under which they are cached."""
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    return [FORMAT, platform.node(), device.type, cores, threads, torch.__version__, world.size]


def cached(key: list[Any], measure: Callable[[], Any], world: World) -> Any:
    """Read a result from the user's cache, or measure it on all ranks and let rank 0 store it (collective)."""
    path = cache_folder() / "planner" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"
    box: list[Any] = [None]
    if world.rank == 0:
        with suppress(OSError, ValueError):  # no file, or a damaged one
            box = [json.loads(path.read_text())]
    dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        return box[0]
    box = [measure()]
    dist.broadcast_object_list(box, src=0)
    if world.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(box[0]))
        temporary.rename(path)
    return box[0]
