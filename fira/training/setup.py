"""From settings to everything a run needs: data, layout, model, trainer."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fira.checkpoint.pretrained import Saved, open_saved
from fira.data.loader import Loader, ValidationSequences
from fira.data.mixture import Joined, Mixture
from fira.data.prepare import Corpus, prepare
from fira.data.tokenizer import TOKENIZER, load_tokenizer, vocabulary
from fira.devices import AUTOCAST_DTYPES, choose_devices, keep_freed_memory, measure_peak, parameter_dtype
from fira.errors import UserError
from fira.models.registry import build, change, from_document, make_config
from fira.parallel.batch_split import BatchSplit
from fira.parallel.layout import choose_layout
from fira.parallel.parallelize import EVERY_BLOCK, parallelize
from fira.planner.candidates import Candidate
from fira.planner.plan import least_recompute
from fira.training import state
from fira.training.auto_layout import with_plan
from fira.training.config import TrainConfig
from fira.training.trainer import Trainer
from pipeline.mesh import Layout, make_mesh
from pipeline.mpi import World
from pipeline.schedule import SCHEDULES


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    trainer: Trainer
    loader: Mixture
    validation: Joined
    corpus: Corpus
    tokenizer: bytes | None  # the content of tokenizer.json
    flops_per_token: float  # forward and backward
    peak: float  # FLOP/s of all ranks together
    heading: str  # what is trained, on what, and how it is spread: for a person


def load_corpus(config: TrainConfig, tokenizer: str | None, vocab_size: int, world: World) -> Corpus:
    """The data, prepared by one rank of each node while the others wait (collective)."""

    def corpus(progress: bool) -> Corpus:
        return prepare(config.data, config.text_column, tokenizer, vocab_size, progress=progress)

    prepared = corpus(progress=world.rank == 0) if world.local_rank == 0 else None
    dist.barrier()
    return prepared or corpus(progress=False)


def choose_model(config: TrainConfig, saved: Saved | None) -> tuple[Any, str | None]:
    """The model's config, and the tokenizer.json that belongs to it, if any: what was saved, or as the flags say."""
    changes = config.model_changes()
    if saved:
        own = str(saved.folder / TOKENIZER) if saved.has_file(TOKENIZER) else None
        model = change(from_document(saved.document("config")), config.name(), changes)
        return model, config.tokenizer or own
    if config.tokenizer and config.vocab_size is None:
        changes["vocab_size"] = vocabulary(load_tokenizer(config.tokenizer))
    return make_config(config.model, changes), config.tokenizer


def choose_microbatch(config: TrainConfig, batch_size: int, layout: Layout) -> int:
    """Sequences per micro-batch: one micro-batch where there is no pipeline, else two per stage, to keep it full."""
    if config.micro_batch_size is not None:
        return config.micro_batch_size
    pieces = 2 * layout.pp if layout.pp > 1 else 1
    return max(1, batch_size // (layout.dp * pieces))


def _recomputed(
    config: TrainConfig, model: Any, candidate: Candidate, devices: list[torch.device], world: World
) -> int:
    """Blocks of every stage to compute again, the same on all ranks (collective)."""
    if len(devices) > 1 and config.recompute not in (None, "none", "full"):
        raise UserError(f"--recompute {config.recompute}: torchgpipe recomputes all or nothing; give full or none")
    if config.recompute != "auto":
        return config.recomputed() or 0
    blocks = torch.tensor(least_recompute(model, candidate, config.precision, devices[0], world.local_size))
    dist.all_reduce(blocks, dist.ReduceOp.MAX)  # machines may differ
    return int(blocks)


def set_up(config: TrainConfig, batch_size: int, world: World) -> Run:
    """Prepare data, build this rank's part of the model and measure the machine (collective)."""
    saved = open_saved(config.init) if config.init else None
    model_config, tokenizer_path = choose_model(config, saved)
    with torch.device("meta"):
        model = build(model_config)
    keep_freed_memory()
    devices = choose_devices(config.device, config.local_devices, world.local_rank)
    if config.plan:
        config = with_plan(config, model, batch_size, devices[0], world)
    schedule = config.schedule or "1f1b"
    layout = choose_layout(
        world.size,
        len(model.layers),
        getattr(model_config, "num_experts", 1),
        config.pp,
        config.dp,
        config.ep,
        stages_per_rank=SCHEDULES[schedule].stages_per_rank,
    )
    corpus = load_corpus(config, tokenizer_path, model_config.vocab_size, world)
    mesh = make_mesh(layout, devices)
    microbatch = choose_microbatch(config, batch_size, layout)
    dtype = parameter_dtype(config.precision)
    split = BatchSplit(microbatch, layout.dp, mesh.dp_rank, model_config.d_model, devices[0])
    candidate = Candidate(layout, schedule, microbatch, split.count(batch_size), recompute=0)
    recomputed = _recomputed(config, model, candidate, devices, world)
    distributed = parallelize(
        model,
        mesh,
        config.seed,
        devices,
        schedule,
        dtype,
        AUTOCAST_DTYPES.get(config.precision),
        recomputed,
    )
    trainer = Trainer(distributed, mesh, split, schedule, config.weight_decay, config.clip, config.precision == "fp16")
    if saved:
        state.load_weights(saved, distributed)
    tokenizer = corpus.tokenizer.read_bytes() if corpus.tokenizer else None
    summary = corpus.summary
    stages = " | ".join(f"{span.start}–{span.stop - 1}" for span in distributed.stages)
    blocks = "all" if recomputed == EVERY_BLOCK else recomputed
    again = f" · {blocks} blocks of each recomputed" if recomputed else ""
    heading = "\n".join(
        [
            f"{config.name()}: {model.num_parameters():,} parameters · {devices[0].type} {config.precision} · {layout}",
            f"{schedule} · micro-batches a replica: {split.count(batch_size)}, each {microbatch} × "
            f"{model_config.seq_len} tokens · stages of layers {stages}{again}",
            f"data: {summary['train_tokens']:,} training and {summary['val_tokens']:,} validation tokens, "
            f"vocabulary {model_config.vocab_size}",
        ]
    )
    return Run(
        trainer=trainer,
        loader=Mixture(
            [Loader(source.train, model_config.seq_len, config.seed) for source in corpus.sources],
            [source.weight for source in corpus.sources],
        ),
        validation=Joined(
            [
                ValidationSequences(
                    source.val, model_config.seq_len, max(1, round(config.eval_sequences * source.weight))
                )
                for source in corpus.sources
            ]
        ),
        corpus=corpus,
        tokenizer=tokenizer,
        flops_per_token=3 * distributed.flops_per_token,
        peak=measure_peak(devices[0], AUTOCAST_DTYPES.get(config.precision, dtype)),
        heading=heading,
    )
