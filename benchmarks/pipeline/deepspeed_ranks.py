"""Time the pipeline of `ranks.py` with DeepSpeed's PipelineModule on gloo. Started by `run.py`.

Usage: mpirun -np N python -m benchmarks.pipeline.deepspeed_ranks MICROBATCHES

DeepSpeed's step includes that of an optimizer, for which this uses the cheapest one, SGD without momentum.
"""

import os
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from mpi4py import MPI

from benchmarks.pipeline.ranks import ROWS, Bench, Layers, cross_entropy
from benchmarks.turns import serve
from fira.devices import keep_freed_memory


def main(microbatches: int) -> None:
    comm = MPI.COMM_WORLD
    rank, ranks = comm.Get_rank(), comm.Get_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo")
    deepspeed.init_distributed("gloo")
    bench = Bench(rank, ranks, microbatches)
    stages = [LayerSpec(Layers, layers) for layers in bench.stages("1f1b")]

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, targets, 1 / targets.numel())  # DeepSpeed takes the mean over micro-batches

    module = PipelineModule(stages, num_stages=ranks, loss_fn=loss, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": microbatches,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-9}},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=[p for p in module.parameters() if p.requires_grad], config=config
    )
    data = list(zip(bench.tokens.split(ROWS), bench.targets.split(ROWS), strict=True))
    engine.train_batch(iter(data))
    serve({"deepspeed: 1f1b": lambda: engine.train_batch(iter(data))}, rank)


if __name__ == "__main__":
    main(int(sys.argv[1]))
