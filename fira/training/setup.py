"""Build the objects of a training run from its settings: data, layout, model and trainer."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from fira.checkpoint.pretrained import Saved, open_saved, stored_config
from fira.data.corpus import Corpus
from fira.data.mixture import Joined, Mixture
from fira.data.tokenizer import TOKENIZER, load_tokenizer, vocabulary
from fira.devices import AUTOCAST_DTYPES, keep_freed_memory, measure_peak, parameter_dtype
from fira.errors import UserError
from fira.models.language_model import LanguageModel
from fira.models.registry import build, change, make_config
from fira.parallel.batch_split import BatchSplit
from fira.parallel.compile_blocks import check_compiler, compile_blocks
from fira.parallel.layout import choose_layout
from fira.parallel.parallelize import EVERY_BLOCK, parallelize
from fira.planner.best_candidates import least_recompute
from fira.planner.candidates import Candidate
from fira.planner.memory_check import check_memory
from fira.posttraining.chat_corpus import ChatCorpus
from fira.training import state
from fira.training.auto_layout import with_plan
from fira.training.config import TrainConfig
from fira.training.run_data import load_corpus, open_data, tokenizer_files
from fira.training.run_evaluation import RunEvaluation, prepare_evaluation
from fira.training.trainer import Trainer
from pipeline.mesh import Layout, make_mesh
from pipeline.mpi import World
from pipeline.schedule import SCHEDULES


@dataclass(frozen=True)
class Run:
    """The objects that the training loop uses.

    config: complete, with the chosen precision and micro-batch size. settings: see `state.run_settings`.
    """

    config: TrainConfig
    settings: dict[str, Any]
    trainer: Trainer
    loader: Mixture
    validation: Joined
    corpus: Corpus | ChatCorpus
    tokenizer: dict[str, bytes]  # the content of its files by name; empty for shards of tokens without a tokenizer
    evaluation: RunEvaluation
    flops_per_token: float  # forward and backward
    peak: float  # FLOP/s of all ranks together
    description: str  # printed before the first step


def set_up(
    config: TrainConfig,
    devices: list[torch.device],
    world: World,
    resumed: Saved | None = None,
    quiet: bool = False,
) -> Run:
    """Prepare the data, build this rank's part of the model and measure the peak FLOP/s (collective).

    config: with the chosen precision. devices: of this rank. resumed: the checkpoint that the run continues from; it
    has the model and the tokenizer of --init, whose folder is therefore not needed.
    """
    saved = (resumed or open_saved(config.init)) if config.init else None
    model_config, tokenizer_path = choose_model(config, saved)
    with torch.device("meta"):
        model = build(model_config)
    keep_freed_memory()
    if config.compile:
        check_compiler(devices[0])
    config, candidate = choose_candidate(config, model, config.recipe().batch_size, devices, world)
    config = replace(config, micro_batch_size=candidate.microbatch)  # a resumed run keeps it on any layout
    corpus = load_corpus(config, tokenizer_path, model_config, world, quiet)
    layout, schedule = candidate.layout, candidate.schedule
    mesh = make_mesh(layout, SCHEDULES[schedule].placement(layout.pp), devices)
    dtype, autocast = parameter_dtype(config.precision), AUTOCAST_DTYPES.get(config.precision)
    split = BatchSplit(candidate.microbatch, layout.dp, mesh.dp_rank, model_config.d_model, devices[0], dtype)
    distributed = parallelize(model, mesh, config.seed, devices, schedule, dtype, autocast, candidate.recompute)
    if config.compile:
        compile_blocks(distributed.modules(), model_config.seq_len)
    trainer = Trainer(distributed, mesh, split, schedule, config.weight_decay, config.clip, config.precision == "fp16")
    if saved and not resumed:
        state.load_weights(saved, distributed)
    loader, validation = open_data(corpus, model_config.seq_len, config)
    tokenizer = tokenizer_files(corpus, tokenizer_path)
    return Run(
        config=config,
        settings=state.run_settings(config, corpus),
        trainer=trainer,
        loader=loader,
        validation=validation,
        corpus=corpus,
        tokenizer=tokenizer,
        evaluation=prepare_evaluation(config, trainer, tokenizer, world),
        flops_per_token=3 * distributed.flops_per_token,
        peak=measure_peak(devices, autocast or dtype),
        description=describe_run(config, model.num_parameters(), trainer, candidate, corpus),
    )


def choose_model(config: TrainConfig, saved: Saved | None) -> tuple[Any, str | None]:
    """The model's config and the path of its tokenizer.json, or None, from the flags or the saved model of --init."""
    changes = config.model_changes()
    if saved:
        saved_tokenizer = str(saved.folder / TOKENIZER) if saved.has_file(TOKENIZER) else None
        model = change(stored_config(saved), config.name(), changes)
        return model, config.tokenizer or saved_tokenizer
    if config.tokenizer and config.vocab_size is None:
        changes["vocab_size"] = vocabulary(load_tokenizer(config.tokenizer))
    return make_config(config.model, changes), config.tokenizer


def choose_candidate(
    config: TrainConfig, model: LanguageModel, batch_size: int, devices: list[torch.device], world: World
) -> tuple[TrainConfig, Candidate]:
    """The layout, schedule, micro-batch size and recomputation, and the settings completed by --plan (collective).

    model: on the meta device. Raises UserError if a setting does not match another or the run does not fit into memory.
    """
    if config.plan:
        config = with_plan(config, model, batch_size, devices[0], world)
    schedule = config.schedule or "1f1b"
    layout = choose_layout(
        world.size,
        len(model.layers),
        getattr(model.config, "num_experts", 1),
        config.pp,
        config.dp,
        config.ep,
        stages_per_rank=SCHEDULES[schedule].stages_per_rank,
    )
    microbatch = choose_microbatch(config, batch_size, layout)
    count = BatchSplit(microbatch, layout.dp, 0, model.config.d_model).count(batch_size)
    candidate = Candidate(layout, schedule, microbatch, count, recompute=0)
    candidate = replace(candidate, recompute=choose_recompute(config, model, candidate, devices, world))
    check_memory(config.name(), model, candidate, config.precision, devices)
    return config, candidate


def choose_microbatch(config: TrainConfig, batch_size: int, layout: Layout) -> int:
    """Sequences per micro-batch: by default one micro-batch per step without a pipeline, else two per stage."""
    if config.micro_batch_size is not None:
        return config.micro_batch_size
    microbatches = 2 * layout.pp if layout.pp > 1 else 1
    return max(1, batch_size // (layout.dp * microbatches))


def choose_recompute(
    config: TrainConfig, model: LanguageModel, candidate: Candidate, devices: list[torch.device], world: World
) -> int:
    """Number of blocks recomputed in every stage, the same on all ranks (collective). model: on any device."""
    if len(devices) > 1 and config.recompute not in (None, "none", "full"):
        raise UserError(f"--recompute {config.recompute}: torchgpipe recomputes all or nothing; give full or none")
    if config.recompute != "auto":
        return config.recomputed() or 0
    blocks = torch.tensor(least_recompute(model, candidate, config.precision, devices[0], world.local_size))
    dist.all_reduce(blocks, dist.ReduceOp.MAX)  # machines may have different amounts of memory
    return int(blocks)


def describe_run(
    config: TrainConfig, parameters: int, trainer: Trainer, candidate: Candidate, corpus: Corpus | ChatCorpus
) -> str:
    """The three lines that are printed before the first step. parameters: of the whole model."""
    model, summary = trainer.model, corpus.summary
    stages = " | ".join(f"{layers.start}–{layers.stop - 1}" for layers in model.stages)
    blocks = "all" if candidate.recompute == EVERY_BLOCK else candidate.recompute
    recomputed = f" · {blocks} blocks per stage recomputed" if blocks else ""
    packed = (
        f" · {summary['train_examples']:,} chats with {summary['train_trained_tokens']:,} trained tokens, "
        f"{summary['shortened']:,} shortened · sequences {summary['train_fill']:.1%} full"
        if isinstance(corpus, ChatCorpus)
        else ""
    )
    return (
        f"{config.name()}: {parameters:,} parameters · {model.device.type} {config.precision} · {candidate.layout}\n"
        f"{candidate.schedule} · micro-batches per replica: {candidate.count}, each {candidate.microbatch} × "
        f"{model.config.seq_len} tokens · stages of layers {stages}{recomputed}\n"
        f"data: {summary['train_tokens']:,} training and {summary['val_tokens']:,} validation tokens, "
        f"vocabulary {model.config.vocab_size}{packed}"
    )
