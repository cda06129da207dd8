"""Build the objects of a training run from its settings: data, layout, model and trainer."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fira.checkpoint.load_model import saved_tokenizer
from fira.checkpoint.merged_checkpoint import AdapterRecord
from fira.checkpoint.pretrained import Saved, open_saved, stored_config
from fira.checkpoint.shards import Checkpoint
from fira.data.corpus import Corpus
from fira.data.loader import TrainingBatches
from fira.data.mixture import CountedBatches
from fira.data.tokenizer import TOKENIZER, load_tokenizer, vocabulary
from fira.data.tokenizer_choice import choose_tokenizer
from fira.devices import AUTOCAST_DTYPES, keep_freed_memory, measure_peak, parameter_dtype
from fira.errors import UserError
from fira.models.adapters import add_adapters
from fira.models.family_options import with_options_of
from fira.models.language_model import LanguageModel
from fira.models.registry import build, change, make_config
from fira.parallel.batch_split import BatchSplit
from fira.parallel.compile_blocks import check_compiler, compile_blocks
from fira.parallel.layout import choose_layout
from fira.parallel.parallelize import EVERY_BLOCK, parallelize
from fira.planner.best_candidates import least_recompute
from fira.planner.candidates import Candidate
from fira.planner.memory_check import check_memory
from fira.planner.model_profile import ModelProfile, profile_of
from fira.posttraining.chat_corpus import ChatCorpus, chat_tokenizer
from fira.training import state
from fira.training.auto_layout import constraints_of, is_planned, plan_layout
from fira.training.base_model import AdaptedModel, open_base
from fira.training.config import TrainConfig
from fira.training.run_data import CHATS, load_corpus, objective_of, open_data, tokenizer_files
from fira.training.run_evaluation import RunEvaluation, prepare_evaluation
from fira.training.text_samples import TextSamples, prepare_samples
from fira.training.trainer import Trainer
from pipeline.mesh import Layout, make_mesh
from pipeline.mpi import World
from pipeline.schedule import SCHEDULES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The objects that the training loop uses.

    config: complete, with the chosen precision and micro-batch size. settings: see `state.run_settings`.
    """

    config: TrainConfig
    settings: dict[str, Any]
    trainer: Trainer
    loader: TrainingBatches
    validation: CountedBatches
    corpus: Corpus | ChatCorpus
    adapters: AdapterRecord | None  # of a LoRA run
    teacher: Saved | None  # of a distillation
    tokenizer: dict[str, bytes]  # the content of its files by name; empty for shards of tokens without a tokenizer
    evaluation: RunEvaluation
    samples: TextSamples | None
    flops_per_token: float  # forward and backward
    peak: float  # FLOP/s of all ranks together
    description: str  # printed before the first step


def set_up(
    config: TrainConfig,
    devices: list[torch.device],
    world: World,
    resumed: Checkpoint | None = None,
    quiet: bool = False,
) -> Run:
    """Prepare the data, build this rank's part of the model and measure the peak FLOP/s (collective).

    config: with the chosen precision. devices: of this rank. resumed: the checkpoint that the run continues from; it
    has the model and the tokenizer of --init, whose folder is therefore not needed.
    """
    chosen = choose(config, resumed)
    config, model, saved, adapted = chosen.config, chosen.model, chosen.saved, chosen.adapted
    tokenizer_path, model_config = chosen.tokenizer_path, model.config
    keep_freed_memory()
    tuned = replace(config, optimizer=None).recipe().optimizer
    if world.rank == 0 and config.lr is None and config.optimizer not in (None, tuned):
        logger.warning("--optimizer %s: the learning rate of the recipe is for %s; see --lr", config.optimizer, tuned)
    if config.compile:
        check_compiler(devices[0])
    candidate = choose_candidate(config, model, devices, world, quiet)
    config = replace(config, micro_batch_size=candidate.microbatch)  # a resumed run keeps it on any layout
    corpus = load_corpus(config, tokenizer_path, model_config, world, quiet)
    layout, schedule = candidate.layout, candidate.schedule
    mesh = make_mesh(layout, SCHEDULES[schedule].placement(layout.pp), devices)
    dtype, autocast = parameter_dtype(config.precision), AUTOCAST_DTYPES.get(config.precision)
    objective = objective_of(config)
    split = BatchSplit(
        candidate.microbatch, layout.dp, mesh.dp_rank, model_config.d_model, devices[0], dtype, objective
    )
    distributed = parallelize(
        model, mesh, config.seed, devices, schedule, dtype, autocast, candidate.recompute, candidate.shard
    )
    if config.compile:
        compile_blocks(distributed.modules(), model_config.seq_len)
    optimizer = config.optimizer_settings()
    trainer = Trainer(distributed, mesh, split, schedule, optimizer, config.clip, config.precision == "fp16")
    if adapted:
        state.load_frozen(adapted.base, distributed)
    elif saved and not resumed:
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
        adapters=adapted.record if adapted else None,
        teacher=chosen.teacher,
        tokenizer=tokenizer,
        evaluation=prepare_evaluation(config, trainer, tokenizer, world),
        samples=prepare_samples(config, trainer, tokenizer, isinstance(corpus, ChatCorpus), world),
        # Forward, gradients of inputs, and gradients of weights, which are few if only adapters are trained.
        flops_per_token=(2 if adapted else 3) * distributed.flops_per_token,
        peak=measure_peak(devices, autocast or dtype),
        description=describe_run(config, model, trainer, candidate, corpus),
    )


@dataclass(frozen=True)
class Chosen:
    """What a run trains. config: with the teacher's tokenizer and a grown vocabulary. model: on the meta device."""

    config: TrainConfig
    model: LanguageModel
    saved: Saved | None  # the model of --init
    adapted: AdaptedModel | None  # of a LoRA run
    teacher: Saved | None  # of a distillation
    tokenizer_path: str | None


def choose(config: TrainConfig, resumed: Checkpoint | None = None) -> Chosen:
    """Open the models that a run starts from, and build its own on the meta device (collective). See `set_up`."""
    saved = (resumed or open_saved(config.init)) if config.init else None
    config, teacher = open_teacher(config)
    adapted = open_base(config.adapters(), saved, resumed)
    model_config, tokenizer_path = choose_model(config, saved)
    if resumed and not saved:
        model_config = with_options_of(stored_config(resumed), model_config, given=config.model_changes())
    if saved and model_config.vocab_size > stored_config(saved).vocab_size:
        config = with_larger_vocabulary(config, stored_config(saved).vocab_size, model_config.vocab_size)
    with torch.device("meta"):
        model = build(model_config)
        if adapted:
            add_adapters(model, adapted.record.lora)
    return Chosen(config, model, saved, adapted, teacher, tokenizer_path)


def open_teacher(config: TrainConfig) -> tuple[TrainConfig, Saved | None]:
    """Open the model of --teacher (collective). A new student without a tokenizer gets that of the teacher.

    Returns the settings with it. Raises UserError for a distillation without a teacher.
    """
    if config.objective != "distill":
        return config, None
    if config.teacher is None:
        raise UserError("--objective distill: no teacher; give a run, a checkpoint or an export as --teacher")
    teacher = open_saved(config.teacher)
    if config.init is None and config.tokenizer is None and teacher.has_file(TOKENIZER):
        size = config.vocab_size or stored_config(teacher).vocab_size
        config = replace(config, tokenizer=saved_tokenizer(teacher), vocab_size=size)
    return config, teacher


def choose_model(config: TrainConfig, saved: Saved | None) -> tuple[Any, str | None]:
    """The model's config and the path of its tokenizer.json, or None, from the flags or the saved model of --init.

    For chats, the vocabulary includes the tokens of the roles that are added to a tokenizer without a chat template.
    For preferences and GRPO, dropout and the router's noise are 0 unless --model-set gives them: the log-probabilities
    of the reference, and the model that samples answers, have none.
    """
    changes = config.model_changes()
    if saved:
        tokenizer = choose_tokenizer(config.tokenizer) or saved_tokenizer(saved)
        model = change(stored_config(saved), config.name(), changes)
    else:
        tokenizer = choose_tokenizer(config.tokenizer, config.data)
        if tokenizer and config.vocab_size is None:
            changes["vocab_size"] = vocabulary(load_tokenizer(tokenizer))
        model = make_config(config.model, changes)
    if config.objective in CHATS and tokenizer and vocabulary(load_tokenizer(tokenizer)) <= model.vocab_size:
        with_roles = vocabulary(chat_tokenizer(Path(tokenizer))[0])
        model = change(model, config.name(), {"vocab_size": max(model.vocab_size, with_roles)})
    if config.objective in ("dpo", "grpo"):
        random = {name for name in ("dropout", "noise") if hasattr(model, name)}
        model = change(model, config.name(), dict.fromkeys(random - changes.keys(), 0.0))
    return model, tokenizer


def with_larger_vocabulary(config: TrainConfig, stored: int, needed: int) -> TrainConfig:
    """The settings of a run whose vocabulary is larger than that of the model of --init. It is logged.

    Raises UserError for a run that trains adapters, because embeddings are frozen.
    """
    if config.lora:
        raise UserError(
            f"--lora: the vocabulary would grow from {stored} to {needed} tokens, but adapters train no embeddings; "
            "give a --tokenizer with a chat template, or fine-tune the model without --lora first"
        )
    text = "%s: the vocabulary grows from %d to %d tokens, the new ones have their initial embeddings"
    logger.info(text, config.name(), stored, needed)
    return replace(config, vocab_size=needed)  # a resumed run has the model of its checkpoint


def choose_candidate(
    config: TrainConfig, model: LanguageModel, devices: list[torch.device], world: World, quiet: bool = False
) -> Candidate:
    """The layout, schedule, micro-batch size and recomputation, as given or chosen by the planner (collective).

    model: on the meta device. Raises UserError if a setting does not match another or the run does not fit into memory.
    """
    schedule, batch_size = config.schedule or "1f1b", config.recipe().batch_size
    spec, experts = SCHEDULES[schedule], getattr(model.config, "num_experts", 1)
    flags = (config.pp, config.dp, config.ep)
    layout = choose_layout(world.size, len(model.layers), experts, *flags, stages_per_rank=spec.stages_per_rank)
    if config.plan != "none" and is_planned(config, model, batch_size, devices, world):
        plan = plan_layout(config, model, batch_size, devices, world, quiet)
        logger.info("%s", plan)
        candidate = plan.trials[0].candidate
    else:
        microbatch = choose_microbatch(config, batch_size, layout)
        count = BatchSplit(microbatch, layout.dp, 0, model.config.d_model).count(batch_size)
        shard = constraints_of(config, batch_size).candidate_shard
        candidate = Candidate(layout, schedule, microbatch, count, 0, shard)
    profile = profile_of(model, config.optimizer_settings().optimizer)
    candidate = replace(candidate, recompute=choose_recompute(config, profile, candidate, devices, world))
    if config.shard == "parameters" and len(devices) > 1:
        raise UserError(
            f"--shard parameters: torchgpipe keeps the weights of its {len(devices)} devices; give --shard optimizer, "
            "or omit --local-devices"
        )
    check_memory(config.name(), profile, candidate, config.precision, devices)
    return candidate


def choose_microbatch(config: TrainConfig, batch_size: int, layout: Layout) -> int:
    """Sequences per micro-batch: by default one micro-batch per step without a pipeline, else two per stage."""
    if config.micro_batch_size is not None:
        return config.micro_batch_size
    microbatches = 2 * layout.pp if layout.pp > 1 else 1
    return max(1, batch_size // (layout.dp * microbatches))


def choose_recompute(
    config: TrainConfig, profile: ModelProfile, candidate: Candidate, devices: list[torch.device], world: World
) -> int:
    """Number of blocks recomputed in every stage, the same on all ranks (collective)."""
    if len(devices) > 1 and config.recompute not in (None, "none", "full"):
        raise UserError(f"--recompute {config.recompute}: torchgpipe recomputes all or nothing; give full or none")
    if config.recompute is None:
        return candidate.recompute
    if config.recompute != "auto":
        return config.recomputed() or 0
    blocks = torch.tensor(least_recompute(profile, candidate, config.precision, devices[0], world.local_size))
    dist.all_reduce(blocks, dist.ReduceOp.MAX)  # machines may have different amounts of memory
    return int(blocks)


def describe_run(
    config: TrainConfig, whole: LanguageModel, trainer: Trainer, candidate: Candidate, corpus: Corpus | ChatCorpus
) -> str:
    """The three lines that are printed before the first step. whole: the model before it is divided over ranks."""
    model, summary = trainer.model, corpus.summary
    trained = sum(math.prod(parameter.shape) for parameter in model.parameters)
    adapters = f", {trained:,} of them in adapters" if model.lora else ""
    stages = " | ".join(f"{layers.start}–{layers.stop - 1}" for layers in model.stages)
    blocks = "all" if candidate.recompute == EVERY_BLOCK else candidate.recompute
    examples = "pairs" if config.objective == "dpo" else "chats"
    recomputed = f" · {blocks} blocks per stage recomputed" if blocks else ""
    packed = (
        f" · {summary['train_examples']:,} {examples} with {summary['train_trained_tokens']:,} trained tokens, "
        f"{summary['shortened']:,} shortened · sequences {summary['train_fill']:.1%} full"
        if isinstance(corpus, ChatCorpus)
        else ""
    )
    return (
        f"{config.name()}: {whole.num_parameters():,} parameters{adapters} · {model.device.type} {config.precision} · "
        f"{candidate.layout}\n"
        f"{candidate.schedule} · micro-batches per replica: {candidate.count}, each {candidate.microbatch} × "
        f"{model.config.seq_len} tokens · stages of layers {stages}{recomputed}\n"
        f"data: {summary['train_tokens']:,} training and {summary['val_tokens']:,} validation tokens, "
        f"vocabulary {model.config.vocab_size}{packed}"
    )
