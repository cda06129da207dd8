"""The numbers of ranks on which a run can continue, and the micro-batch size that all of them have in common.

For a given micro-batch size and number of threads per rank, the result does not depend on the layout. A run whose
number of ranks changes therefore computes the same weights as an undisturbed one.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fira.checkpoint.pretrained import open_saved
from fira.errors import UserError
from fira.models.registry import build
from fira.parallel.layout import choose_layout
from fira.training.config import TrainConfig
from fira.training.setup import choose_microbatch, choose_model
from pipeline.mesh import Layout
from pipeline.mpi.cores import own_cores
from pipeline.schedule import SCHEDULES


@dataclass(frozen=True)
class Elastic:
    """The layout of every usable number of ranks, in ascending order, and the common micro-batch size."""

    layouts: dict[int, Layout]
    microbatch: int

    @property
    def most(self) -> int:
        """The largest usable number of ranks."""
        return max(self.layouts)

    def usable(self, slots: int) -> int | None:
        """The largest usable number of ranks on a number of slots, or None."""
        return max((ranks for ranks in self.layouts if ranks <= slots), default=None)


def parse_range(text: str | None) -> range:
    """The numbers of ranks of `--elastic MIN:MAX` or `N`; without it, those that Slurm has allocated, or one."""
    words = text or os.environ.get("SLURM_NTASKS", "1")
    found = re.fullmatch(r"([0-9]{1,5})(?::([0-9]{1,5}))?", words)
    numbers = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not numbers or numbers.start < 1:
        raise UserError(f"--elastic {words}: give the smallest and the largest number of ranks, such as 2:4")
    return numbers


def elastic(config: TrainConfig) -> Elastic:
    """Choose layouts and micro-batch size. Raises UserError if no number of ranks fits the given layout.

    The micro-batch size is the given one, which a resumed run has from its run folder. Otherwise it is the smallest
    default of the layouts, with which each of them has enough micro-batches for its pipeline.
    """
    layouts, refused = {}, ""
    blocks, experts = _size(config)
    stages = SCHEDULES[config.schedule or "1f1b"].stages_per_rank
    for ranks in parse_range(config.elastic):
        try:
            layouts[ranks] = choose_layout(ranks, blocks, experts, config.pp, config.dp, config.ep, stages)
        except UserError as error:
            refused = str(error)
    if not layouts:
        raise UserError(f"--elastic {config.elastic}: no number of ranks is possible: {refused}")
    batch = config.recipe().batch_size
    return Elastic(layouts, min(choose_microbatch(config, batch, layout) for layout in layouts.values()))


def threads_per_rank(most: int, slots: Mapping[str, int] | None) -> int:
    """The number of threads with which the largest number of ranks uses all cores of a machine.

    slots: by host; None: all ranks run on this machine.
    """
    local = min(most, max(slots.values(), default=1)) if slots else most
    return max(1, len(own_cores()) // local)


def _size(config: TrainConfig) -> tuple[int, int]:
    """The number of layers, embedding and head included, and of experts."""
    model_config, _ = choose_model(config, open_saved(config.init) if config.init else None)
    with torch.device("meta"):
        return len(build(model_config).layers), getattr(model_config, "num_experts", 1)
