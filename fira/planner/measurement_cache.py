"""Results of measurements on disk, by what they depend on."""

import hashlib
import json
import logging
import platform
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fira.data.cache import cache_folder
from pipeline.mpi import World
from pipeline.mpi.cores import own_cores

FORMAT = 8  # increase it when the cached values change
T = TypeVar("T")

logger = logging.getLogger(__name__)


def machine_identity(device: torch.device, world: World) -> list[Any]:
    """What measurements depend on apart from the model: a part of the keys under which they are cached."""
    cores = len(own_cores())
    threads = torch.get_num_threads()
    return [FORMAT, platform.node(), device.type, cores, threads, torch.__version__, world.size]


def cached(
    key: list[Any],
    measure: Callable[[], Any],
    parse: Callable[[Any], T],
    world: World,
    is_valid: Callable[[Any], bool] = lambda found: True,
) -> T:
    """Read a result from the user's cache, or measure it on all ranks and let rank 0 store it (collective).

    measure: returns the result as JSON values. parse: converts them, and may raise for values of another form.
    is_valid: whether a stored result can be used; otherwise it is measured again.
    """
    path = cache_folder() / "planner" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"
    box: list[Any] = [None]
    if world.rank == 0:
        # no file, or a damaged one
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            found = json.loads(path.read_text())
            parse(found)
            box = [found if is_valid(found) else None]
    dist.broadcast_object_list(box, src=0)
    if box[0] is None:
        box = [measure()]
        dist.broadcast_object_list(box, src=0)
        if world.rank == 0:
            _store(path, box[0])
    return parse(box[0])


def _store(path: Path, result: Any) -> None:
    """Write a result. Without a folder that can be written, it is measured again next time."""
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(result))
        temporary.rename(path)
    except OSError as error:
        logger.warning("measurements cannot be stored and will be repeated in the next run: %s", error)
