"""The contenders for one number of ranks, each with its own model. Started by run.py under mpirun."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.nn.parallel import DistributedDataParallel

import pipeline
from benchmarks.measure import products
from benchmarks.pipeline.ranks import Layers, cross_entropy
from benchmarks.turns import serve
from fira.devices import keep_freed_memory
from fira.doctor.one_step import RandomTokens, make_trainer
from fira.models.fira import FIRA, FiraConfig
from fira.nn.context import Context, TrainingContext
from fira.parallel.microbatch_loss import microbatch_loss
from fira.parallel.parallelize import layer_flops
from fira.planner.candidates import Candidate
from pipeline.mesh import CPU, Layout
from pipeline.partition import partition

CONFIG = FiraConfig(
    vocab_size=8192, seq_len=256, d_model=384, n_head=6, num_layers=6, d_ff=1104, num_experts=4, dropout=0.0
)
BATCH = 8  # sequences per step of every contender
MICROBATCH = 4  # sequences per forward in one process
CANDIDATES = {  # layout, schedule, sequences per micro-batch, micro-batches per replica, recomputed blocks
    1: [Candidate(Layout(1, 1, 1), "1f1b", 4, 2, 0)],
    2: [
        Candidate(Layout(2, 1, 1), "1f1b", 1, 8, 0),
        Candidate(Layout(2, 1, 1), "zb-2p", 1, 8, 0),
        Candidate(Layout(1, 2, 1), "1f1b", 4, 1, 0),
        Candidate(Layout(1, 2, 2), "1f1b", 4, 1, 0),
    ],
    4: [
        Candidate(Layout(4, 1, 1), "1f1b", 1, 8, 0),
        Candidate(Layout(2, 2, 2), "1f1b", 1, 4, 0),
        Candidate(Layout(1, 4, 1), "1f1b", 2, 1, 0),
        Candidate(Layout(1, 4, 4), "1f1b", 2, 1, 0),
    ],
}
Run = Callable[[], object]


def name_of(candidate: Candidate) -> str:
    """Return the name of a candidate in the table."""
    layout = candidate.layout
    name = f"ours, pp {layout.pp} × dp {layout.dp}" + (f" (ep {layout.ep})" if layout.ep > 1 else "")
    return name + (f", {candidate.schedule}" if candidate.layout.pp > 1 else "")


def tokens() -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a global batch, each [BATCH, seq_len]."""
    rows = RandomTokens(CONFIG.vocab_size, CONFIG.seq_len).batch(0, BATCH)
    return torch.from_numpy(rows.tokens), torch.from_numpy(rows.targets)


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.1, fused=True)


def ours(candidate: Candidate) -> Run:
    trainer = make_trainer(CONFIG, candidate.layout, candidate.schedule, CPU, candidate.microbatch)
    loader = RandomTokens(CONFIG.vocab_size, CONFIG.seq_len)
    return lambda: trainer.step(loader, BATCH, 1e-4, 0, [])


def data_parallel(group: dist.ProcessGroup) -> Run:
    """Return a step of the same model in PyTorch's DistributedDataParallel."""
    return step_of(DistributedDataParallel(FIRA(CONFIG), process_group=group, gradient_as_bucket_view=True))


def step_of(model: nn.Module) -> Run:
    """Return a step of a model whose gradients are averaged over the ranks."""
    optimizer = optimizer_of(model)
    share = BATCH // dist.get_world_size()
    rows = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)

    def run() -> None:
        inputs, targets = (part[rows] for part in tokens())
        weights = torch.full((share,), 1 / share)
        context = Context(training=TrainingContext(targets, 1 / targets.numel(), weights))
        microbatch_loss(model(inputs, context), context)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def torch_pipeline(group: dist.ProcessGroup) -> Run:
    """Return a step of the same model in PyTorch's pipelining with 1F1B; gradients are not clipped."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = FIRA(CONFIG)
    span = partition(layer_flops(model), ranks)[rank]
    layers = Layers(model.layers[span.start : span.stop])
    optimizer = optimizer_of(layers)
    inputs, targets = tokens()
    stage = pipelining.PipelineStage(layers, rank, ranks, torch.device("cpu"), group=group)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, 1 / targets.numel())

    runner = pipelining.Schedule1F1B(stage, 8, loss_fn=loss, scale_grads=False)

    def run() -> None:
        runner.step(*([inputs] if rank == 0 else []), **({"target": targets} if rank == ranks - 1 else {}))
        optimizer.step()
        optimizer.zero_grad()

    return run


def mixtral() -> Run:
    """Return a step of transformers' Mixtral with equal width, depth, number of experts and active FLOPs.

    Its experts have three matrices of 2/3 the size.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.d_model,
        intermediate_size=CONFIG.d_ff * 2 // 3,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.n_head,
        num_key_value_heads=CONFIG.n_head,
        num_local_experts=CONFIG.num_experts,
        num_experts_per_tok=CONFIG.top_k,
        output_router_logits=True,
    )
    model = MixtralForCausalLM._from_config(config, experts_implementation="grouped_mm")
    optimizer = optimizer_of(model)

    def run() -> None:
        inputs, targets = tokens()
        for x, y in zip(inputs.split(MICROBATCH), targets.split(MICROBATCH), strict=True):
            (model(input_ids=x, labels=y, use_cache=False).loss * (MICROBATCH / BATCH)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    world = pipeline.init(timeout_s=3600)  # a rank waits while other jobs are timed
    keep_freed_memory()
    runs = {name_of(candidate): ours(candidate) for candidate in CANDIDATES[world.size]}
    if world.size == 1:
        runs["peak"] = products()[0]
        runs["transformers' Mixtral"] = mixtral()
    else:
        gloo = dist.new_group(backend="gloo")
        runs["DDP on gloo"] = data_parallel(gloo)
        runs["torch pipelining on gloo, 1f1b"] = torch_pipeline(gloo)
    for run in runs.values():
        run()
    serve(runs, world.rank)


if __name__ == "__main__":
    main()
