"""Training steps with sums in the order of a tree and in any order, as contenders of `cost.py`."""

import dataclasses
from collections.abc import Callable

import torch

import pipeline
from benchmarks.turns import serve
from fira.data.random_tokens import RandomTokens
from fira.devices import keep_freed_memory
from fira.models.fira import FiraConfig
from fira.models.registry import PRESETS, build
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.parallelize import parallelize
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, make_mesh
from tests.ranks.plain_reduction import PlainReduction

BATCH, MICROBATCH = 16, 4  # sequences
MODELS = {
    "fira-tiny": PRESETS["fira-tiny"],
    "30 million": FiraConfig(vocab_size=4096, seq_len=128, d_model=384, n_head=6, num_layers=6, d_ff=768),
}
LAYOUTS = {1: [(1, 1, 1)], 2: [(2, 1, 1), (1, 2, 1), (1, 2, 2)], 4: [(2, 2, 2)]}


def step_of(model: str, layout: Layout, exact: bool) -> Callable[[], object]:
    config = MODELS[model]
    mesh = make_mesh(layout, range(layout.pp))
    if not exact:  # experts compute the rows of all ranks together
        mesh = dataclasses.replace(mesh, device_type="cuda")
    with torch.device("meta"):
        built = parallelize(build(config), mesh, 0, [CPU])
    split = BatchSplit(MICROBATCH, layout.dp, mesh.dp_rank, config.d_model)
    trainer = Trainer(built, mesh, split, "1f1b", OptimizerSettings(), clip=1.0, fp16=False)
    if not exact:
        trainer.reduction = PlainReduction(built, mesh)
    loader = RandomTokens(config.vocab_size, config.seq_len)
    return lambda: trainer.step(loader, BATCH, 1e-4, 0)  # type: ignore[arg-type]


def main() -> None:
    world = pipeline.init()
    keep_freed_memory()
    runs = {}
    for model in MODELS:
        for layout in (Layout(*sizes) for sizes in LAYOUTS[world.size]):
            for exact in (True, False):
                runs[f"{model}, {layout}, {'tree' if exact else 'plain'}"] = step_of(model, layout, exact)
    serve(runs, world.rank)


if __name__ == "__main__":
    main()
