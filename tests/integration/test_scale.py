"""The mesh and `parallelize` on up to 1,024 ranks, one at a time, with torch's process group that communicates nothing.

Models are on the meta device, except where initial weights are compared.
"""

import functools
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import fira
import pipeline
from fira.models.blues import BluesConfig
from fira.models.fira import FiraConfig
from fira.models.language_model import LanguageModel
from fira.models.registry import build
from fira.parallel.parallelize import DistributedModel, parallelize
from pipeline.mesh import CPU, Layout, Mesh, make_mesh
from pipeline.schedule import SCHEDULES
from tests.torch_versions import needs_meta_send

META = torch.device("meta")
SMALL: dict[str, Any] = {"vocab_size": 31, "seq_len": 8, "d_model": 8, "d_ff": 4, "num_layers": 14}
FIRA = FiraConfig(**SMALL, n_head=2, num_experts=16)
BLUES = BluesConfig(**SMALL, n_head=2, n_kv_head=1, num_experts=16)  # tied
SOURCES = tuple(f"{Path(package.__file__).parent}/" for package in (fira, pipeline))

CASES = [
    (FIRA, Layout(1, 8, 8), "1f1b"),
    (FIRA, Layout(2, 4, 2), "interleaved"),
    (BLUES, Layout(4, 2, 1), "zb-v"),
    (FIRA, Layout(4, 16, 4), "zb-v"),
    pytest.param(BLUES, Layout(16, 4, 4), "1f1b", marks=needs_meta_send),
    *(
        pytest.param(config, layout, schedule, marks=[needs_meta_send, pytest.mark.slow, pytest.mark.timeout(600)])
        for config, layout, schedule in [
            (FIRA, Layout(1, 64, 16), "gpipe"),
            (BLUES, Layout(8, 128, 16), "interleaved"),
            (FIRA, Layout(16, 64, 8), "zb-h1"),
        ]
    ),
]


@contextmanager
def process(rank: int, world: int) -> Iterator[None]:
    """Play one rank of a job."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@functools.cache
def model_of(config: Any) -> LanguageModel:
    """The whole model on the meta device, which `parallelize` does not modify."""
    with META:
        return build(config)


def distribute(
    config: Any, layout: Layout, schedule: str, device: torch.device = META
) -> tuple[Mesh, DistributedModel]:
    mesh = make_mesh(layout, SCHEDULES[schedule].placement(layout.pp))
    return mesh, parallelize(model_of(config), mesh, 7, [device], schedule)


@pytest.mark.parametrize(("config", "layout", "schedule"), CASES)
def test_every_parameter_is_held_where_it_should_be(config, layout, schedule):
    """Also the groups over which gradients are summed are exactly the ranks that hold the same tensor."""
    shapes = {name: parameter.shape for name, parameter in model_of(config).named_parameters()}
    coordinates = [
        np.unravel_index(rank, (layout.pp, layout.dp // layout.ep, layout.ep)) for rank in range(layout.world)
    ]
    holders = defaultdict(set)  # of each parameter, and of each expert's slice of it
    groups = defaultdict(set)
    pipeline_ranks = defaultdict(set)
    for rank, (pp, _, ep) in enumerate(coordinates):
        with process(rank, layout.world):
            mesh, model = distribute(config, layout, schedule)
            sums = {axis: tuple(dist.get_process_group_ranks(mesh.groups[axis])) for axis in ("dp", "edp")}
        assert [tensor.name for tensor in model.parameters] == list(shapes)
        for shard in model.shards:
            expert = ".experts." in shard.name
            assert shard.expert == expert
            assert shard.shape == shapes[shard.name]
            rows = len(shard.parameter)
            assert shard.parameter.shape == (rows, *shapes[shard.name][1:])
            assert (rows, shard.start) == ((16 // layout.ep, ep * 16 // layout.ep) if expert else (shard.shape[0], 0))
            parts = [(shard.name, shard.start + row) for row in range(rows)] if expert else [(shard.name, None)]
            for part in parts:
                holders[part].add(rank)
                groups[part].add(sums["edp" if expert else "dp"])
            pipeline_ranks[shard.name].add(pp)
    experts = {name for name in shapes if ".experts." in name}
    assert set(holders) == {(n, None) for n in shapes.keys() - experts} | {(n, e) for n in experts for e in range(16)}
    for part, ranks in holders.items():
        assert len(ranks) == (layout.dp if part[1] is None else layout.dp // layout.ep), part
        assert groups[part] == {tuple(sorted(ranks))}, part
    layers = {name.split(".")[1]: ranks for name, ranks in pipeline_ranks.items()}
    for name, ranks in pipeline_ranks.items():
        assert len(ranks) == 1
        assert ranks == layers[name.split(".")[1]]  # a layer is not divided between stages
    assert set().union(*layers.values()) == set(range(layout.pp))


@pytest.mark.parametrize(("layout", "schedule"), [(Layout(4, 256, 16), "zb-v"), (Layout(16, 64, 4), "1f1b")])
def test_weights_of_1024_ranks_equal_those_of_one(layout, schedule):
    with process(0, 1):
        _, whole = distribute(FIRA, Layout(), "gpipe", CPU)
    weights = {shard.name: shard.parameter for shard in whole.shards}
    for rank in (0, 1, layout.dp - 1, layout.dp, layout.world // 2 + 5, layout.world - 1):
        with process(rank, layout.world):
            _, part = distribute(FIRA, layout, schedule, CPU)
        assert part.shards
        for shard in part.shards:
            rows = slice(shard.start, shard.start + len(shard.parameter))
            assert shard.parameter.equal(weights[shard.name][rows]), shard.name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_set_up_does_not_grow_with_the_number_of_ranks(schedule, monkeypatch):
    """The number of process groups, of collectives and of executed lines depends on pp and on the layers only."""
    counts = []
    for layout in (Layout(4, 2, 2), Layout(4, 16, 2), Layout(4, 256, 2)):
        calls: Counter[str] = Counter()

        def count(name: str, function: Any, calls: Counter[str] = calls) -> Any:
            def counted(*args: Any, **kwargs: Any) -> Any:
                calls[name] += 1
                return function(*args, **kwargs)

            return counted

        def trace(frame: FrameType, event: str, _: Any, calls: Counter[str] = calls) -> Any:
            calls["lines"] += event == "line"
            return trace if frame.f_code.co_filename.startswith(SOURCES) else None

        with monkeypatch.context() as patch, process(layout.dp + 1, layout.world):
            for name in ("new_group", "all_reduce", "send", "recv"):
                patch.setattr(dist, name, count(name, getattr(dist, name)))
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                distribute(FIRA, layout, schedule)
            finally:
                sys.settrace(before)
        counts.append(calls)
    assert counts[0]["new_group"] == 4 + counts[0]["send"] + counts[0]["recv"]
    assert counts[0]["lines"] > 1000
    assert counts == [counts[0]] * 3
