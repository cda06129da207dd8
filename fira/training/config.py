"""The settings of a training run: a dataclass that defines the flags and the keys of a --config file.

Modules that import torch are imported by the methods that need them, so that flags are parsed without it.
"""

from argparse import ArgumentTypeError
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fira.errors import UserError
from fira.metrics.trackers import TRACKERS, parse_names
from fira.models.family import Recipe
from fira.nn.lora import FORM, Lora
from fira.optim.lr_schedule import LR_SCHEDULES, WARMUP_SHAPES
from fira.optim.settings import OPTIMIZERS, OptimizerSettings
from fira.training.save_interval import SaveInterval
from fira.training.setting_values import parse_value, to_toml
from fira.value_types import (
    AnyText,
    ClosedShare,
    Fraction,
    InFp32,
    NotNegative,
    PathName,
    Positive,
    Seconds,
    Seed,
    Sequences,
    Size,
    Steps,
    Threads,
    Tokens,
    check,
    flag_type,
)
from pipeline.schedule import SCHEDULES

CONFIG_NAME = "config.toml"  # file name in run folders

# Settings that a resumed run takes from the run's config.toml: all but those of the machine, the layout and the output.
INHERITED = [
    *("model", "model_set", "data", "objective", "text_column", "tokenizer", "vocab_size", "seq_len", "document_mask"),
    *("batch_size", "micro_batch_size", "steps", "lr", "min_lr", "warmup", "warmup_shape", "lr_schedule", "lr_decay"),
    *("optimizer", "embedding_lr_scale", "router_lr_scale", "beta1", "beta2", "eps", "weight_decay", "cautious_decay"),
    *("clip", "precision", "seed", "sample_prompts", "sample_every", "track"),
    *("dpo_loss", "dpo_beta", "teacher", "teacher_top_k", "teacher_online", "distill_beta", "distill_temperature"),
    *("on_policy", "group_size", "answer_after", "answer_tokens", "init", "lora", "threads"),
    *("eval_every", "eval_sequences", "eval_tasks", "eval_tasks_every", "save_every", "keep", "on_spike"),
]
# Settings that earlier versions did not store.
EARLIER = {**asdict(OptimizerSettings()), "lr_schedule": "cosine", "warmup_shape": "linear", "document_mask": False}
PLANNED = ("micro_batch_size", "pp", "dp", "ep", "schedule", "recompute", "shard")  # settings that the planner chooses
SUPERVISED = ("elastic", "max_restarts", "hosts", "launcher")  # settings of the supervisor, which the ranks do not get

PRESET_FAMILIES = "fira, rish, rish-olmoe, mooshak, blues or microrwkv"
DPO_LOSSES = ("sigmoid", "ipo", "sigmoid-norm")

FINE_TUNING = Recipe(steps=200, lr=1e-4, min_lr=1e-5, warmup=20)  # used with --init
PREFERENCES = Recipe(steps=200, lr=2e-5, min_lr=2e-6, warmup=20)  # used with --objective dpo and grpo


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Settings, named like their flags. If layout or micro-batch size is None, it is chosen for the number of ranks."""

    model: str = _option("fira-tiny", f"preset: FAMILY-tiny or FAMILY-base, where FAMILY is {PRESET_FAMILIES}")
    model_set: AnyText = _option("", "changes to the preset, such as d_model=256,num_layers=6")
    data: str | None = _option(
        None,
        "text file or folder, .csv, .jsonl, .parquet or .tar, also as .gz or .zst; shards of token ids; or the name of "
        "a dataset; A=0.7,B=0.3 mixes",
    )
    objective: str = _option(
        "pretrain",
        "pretrain: the next token of text; sft: the answers in chats, one per row of --data; "
        "dpo: preferences, a chosen and a rejected answer per row; distill: the distribution of "
        "--teacher, on text or chats; grpo: the final answers of chats, by sampled answers",
        ("pretrain", "sft", "dpo", "distill", "grpo"),
    )
    dpo_loss: str = _option("sigmoid", "loss of a pair; ipo and sigmoid-norm average over the tokens", DPO_LOSSES)
    dpo_beta: Positive = _option(0.1, "β of --objective dpo; larger: closer to the initial model")
    teacher: PathName | None = _option(
        None, "teacher of --objective distill: a run, a checkpoint or an export of any family, with the same tokenizer"
    )
    teacher_top_k: Size = _option(32, "tokens of the teacher's distribution; the others are summed")
    teacher_online: bool = _option(False, "run the teacher in every step instead of storing its tokens before training")
    distill_beta: ClosedShare = _option(0.0, "0: forward KL; 1: reverse KL; between: generalised Jensen–Shannon")
    distill_temperature: Positive = _option(1.0, "temperature of both distributions in --objective distill")
    on_policy: ClosedShare = _option(
        0.0, "with --teacher-online: share of the sequences of chats whose answers the student samples"
    )
    group_size: Size = _option(8, "answers to each prompt in --objective grpo; divides --batch-size")
    answer_after: AnyText | None = _option(
        None,
        'text after which the final answer is, as in "so 42", for --objective grpo; default: the answer is the whole',
    )
    answer_tokens: Steps = _option(
        0, "largest number of tokens of a sampled answer; it may always be as long as the answer in the data"
    )
    text_column: str = _option("text", "column or key that holds the text")
    tokenizer: PathName | None = _option(
        None, "a tokenizer.json, or tiktoken's o200k_base or r50k_base; default: that of shards, or one is trained"
    )
    vocab_size: Tokens | None = _option(None, "vocabulary; default: the preset's")
    seq_len: Tokens | None = _option(None, "tokens per sequence; default: the preset's context")
    document_mask: bool = _option(
        False, "keep documents of text apart: a token attends only to its own, and a recurrent state begins with it"
    )
    batch_size: Sequences | None = _option(None, "sequences in the global batch; default: the preset's recipe")
    micro_batch_size: Sequences | None = _option(None, "sequences in a micro-batch; default: see --plan")
    steps: int | None = _option(None, "total optimizer steps; default: the recipe's, also for lr, min-lr, warmup")
    lr: Positive | None = _option(None, "peak learning rate")
    min_lr: NotNegative | None = _option(None, "learning rate at the last step")
    warmup: Steps | None = _option(None, "steps of warmup")
    warmup_shape: str = _option("linear", "linear, or log as in DeepSpeed's WarmupLR", WARMUP_SHAPES)
    lr_schedule: str | None = _option(
        None, "after the warmup; wsd: constant, then a linear decay; default: the recipe's", LR_SCHEDULES
    )
    lr_decay: ClosedShare = _option(0.2, "share of the steps in which --lr-schedule wsd decays; 0: none")
    optimizer: str | None = _option(
        None,
        "adamw, or muon for the matrices of the blocks and AdamW for all others; default: the recipe's",
        OPTIMIZERS,
    )
    embedding_lr_scale: Positive | None = _option(None, "factor of the learning rate of token embeddings")
    router_lr_scale: Positive | None = _option(None, "factor of the learning rate of routers")
    beta1: Fraction = _option(0.9, "decay rate of AdamW's average of gradients")
    beta2: Fraction = _option(0.95, "decay rate of AdamW's average of squared gradients")
    eps: InFp32 = _option(1e-8, "added to the denominator of AdamW")
    weight_decay: NotNegative = _option(0.1, "weight decay of matrices other than embeddings")
    cautious_decay: bool = _option(False, "decay only those weights that the update moves towards zero")
    clip: NotNegative = _option(1.0, "maximum global gradient norm; 0: no clipping")
    pp: Size | None = _option(None, "pipeline stages")
    dp: Size | None = _option(None, "data-parallel replicas")
    ep: Size | None = _option(None, "ranks that the experts are split over; divides dp")
    shard: str | None = _option(
        None,
        "optimizer: each replica has the moments of a part of the parameters, and updates them (ZeRO-1); parameters: "
        "it also keeps only these parameters and gradients, and gathers others for each layer (ZeRO-3); none: neither",
        ("none", "optimizer", "parameters"),
    )
    schedule: str | None = _option(None, "pipeline schedule; default: the fastest one", tuple(SCHEDULES))
    plan: str = _option(
        "auto",
        "auto: measure, and choose the fastest layout, schedule and micro-batch size where they are not given; "
        "explain: print the candidates and exit; none: a fixed layout, without a measurement",
        ("auto", "explain", "none"),
    )
    device: str = _option("auto", "device type", ("auto", "cpu", "cuda"))
    threads: Threads | None = _option(
        None, "CPU threads per rank; default: $OMP_NUM_THREADS, or cores / ranks of a machine"
    )
    local_devices: str | None = _option(None, "devices torchgpipe splits a stage over, such as cuda:0,cuda:1")
    precision: str = _option(
        "auto",
        "precision of the matrix products; auto: bf16 or fp16 if the GPUs have instructions for it, fp32 on a CPU",
        ("auto", "fp32", "bf16", "fp16", "fp64"),
    )
    recompute: str | None = _option(
        None,
        "blocks recomputed in the backward, of which only the input is kept: none, full, N (the first N per stage) "
        "or auto (the fewest that fit into memory); by default the fewest, where a layout is planned",
    )
    compile: bool = _option(False, "compile attention, norms and routers with torch.compile in the first step")
    out: PathName | None = _option(None, "run folder; default: a new one under runs/")
    init: PathName | None = _option(
        None, "start from model, weights and tokenizer of a run, a checkpoint, an export, a Llama, FlexOlmo or OLMoE"
    )
    lora: str | None = _option(None, f"with --init: freeze the model, and train low-rank adapters, as in {FORM}")
    resume: PathName | None = _option(None, "auto (newest checkpoint in the run folder) or a checkpoint")
    override: bool = _option(False, "resume with settings that differ from those of the checkpoint")
    eval_every: int = _option(50, "steps between validations")
    eval_sequences: int = _option(128, "sequences per validation, evenly spaced in the validation set")
    eval_tasks: str | None = _option(None, "comma-separated JSONL files of examples to evaluate, as in evaluate.py")
    eval_tasks_every: int | None = _option(None, "steps between evaluations; default: after the last step only")
    sample_prompts: PathName | None = _option(None, "text file with a prompt per line, after which the model generates")
    sample_every: int | None = _option(None, "steps between these samples; default: after the last step only")
    track: str | None = _option(None, f"trackers that get all numbers, with commas between: {', '.join(TRACKERS)}")
    save_every: str = _option("100", "steps between checkpoints, or a time such as 600s, 10m or 2h")
    keep: int = _option(2, "checkpoints kept")
    on_spike: str = _option(
        "ignore",
        "rollback: after a loss spike or a loss that is not finite, restore the last checkpoint and skip the sequences "
        "read since; ignore: continue after a spike, end the run at a loss that is not finite",
        ("ignore", "rollback"),
    )
    trace: PathName | None = _option(None, "write a trace of the third step to this file, for ui.perfetto.dev")
    seed: Seed = _option(42, "seed of weights, data order and dropout")
    timeout: Seconds | None = _option(
        None,
        "seconds a rank waits for another before the job ends with a report; default: $PIPELINE_MPI_TIMEOUT_S, or 600",
    )
    elastic: str | None = _option(
        None,
        "MIN:MAX: start this many ranks with mpirun or srun, and restart them after a failure, also with fewer or more",
    )
    max_restarts: Steps | None = _option(None, "successive restarts without a newer checkpoint; default: 3")
    hosts: PathName | None = _option(
        None, "with --elastic: available hosts, as a host file of mpirun or a program that prints one"
    )
    launcher: str | None = _option(
        None, 'with --elastic: the launcher and its flags, such as "mpirun --oversubscribe"; default: srun or mpirun'
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            check(f"--{setting.name.replace('_', '-')}", getattr(self, setting.name), setting.type)
        self.recomputed()  # raises UserError if `recompute` is invalid
        if self.init and self.model != TrainConfig.model:
            raise UserError(f"--model {self.model}: the model is that of --init; omit one of the flags")
        if self.adapters() and not self.init:
            raise UserError("--lora: no model to adapt; give a run, a checkpoint or an exported folder as --init")
        if self.on_policy and not (self.objective == "distill" and self.teacher_online):
            raise UserError("--on-policy: the teacher reads what the student samples; add --teacher-online")
        if self.objective == "grpo" and self.group_size == 1:
            raise UserError("--group-size 1: an answer is compared with others to the same prompt; give at least 2")
        if self.answer_after == "":
            raise UserError("--answer-after: the text is empty; omit the flag to compare whole answers")
        if self.sample_every is not None and self.sample_prompts is None:
            raise UserError("--sample-every: no prompts; give a text file with a prompt per line as --sample-prompts")
        SaveInterval(self.save_every)
        parse_names(self.track)

    @property
    def samples_answers(self) -> bool:
        """Whether the model samples answers in training."""
        return self.objective == "grpo" or self.on_policy > 0

    def recomputed(self) -> int | None:
        """Number of blocks recomputed in every stage; None: automatic, or not given."""
        if self.recompute in (None, "auto"):
            return None
        if self.recompute == "none":
            return 0
        if self.recompute == "full":
            from fira.parallel.parallelize import EVERY_BLOCK

            return EVERY_BLOCK
        with suppress(ArgumentTypeError):
            return int(flag_type(Steps)(str(self.recompute)))
        raise UserError(f"--recompute {self.recompute}: give none, full, auto, or a number of blocks per stage")

    def adapters(self) -> Lora | None:
        """The settings of the adapters, if there are any."""
        return Lora.parse(self.lora) if self.lora is not None else None

    def optimizer_settings(self) -> OptimizerSettings:
        """The settings of the optimizer, apart from the learning rate."""
        given = {f.name: getattr(self, f.name) for f in fields(OptimizerSettings)}
        recipe = asdict(self.recipe())
        return OptimizerSettings(**given | {name: recipe[name] for name in given if name in recipe})

    def recipe(self) -> Recipe:
        """The settings of `Recipe` as given, else those of the objective, of `init`, or of the preset."""
        from fira.models.registry import PRESETS, RECIPES

        if self.model not in RECIPES:
            raise UserError(f"--model {self.model}: no such preset; choose from {', '.join(PRESETS)}")
        given: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Recipe)}
        recipe = FINE_TUNING if self.init else RECIPES[self.model]
        if self.objective in ("dpo", "grpo"):
            recipe = PREFERENCES
        if self.optimizer not in (None, recipe.optimizer):
            recipe = replace(recipe, embedding_lr_scale=1.0, router_lr_scale=1.0)  # they were tuned for its optimizer
        return replace(recipe, **{name: value for name, value in given.items() if value is not None})

    def name(self) -> str:
        """Short name of the model: the preset, or the name of the folder given by `init`."""
        return Path(self.init).resolve().name if self.init else self.model

    def model_changes(self) -> dict[str, Any]:
        """Fields of the preset's config that `model_set`, `vocab_size` and `seq_len` override."""
        changes: dict[str, Any] = {}
        for item in filter(None, self.model_set.split(",")):
            name, separator, value = item.partition("=")
            if not separator:
                raise UserError(f"--model-set {item}: give NAME=VALUE, as in d_model=256 or norm_order=post")
            changes[name.strip().replace("-", "_")] = parse_value(value.strip())
        for name in ("vocab_size", "seq_len"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        return changes

    def given(self) -> dict[str, Any]:
        """The settings of the run that are not None."""
        values = asdict(self) | asdict(self.recipe())
        del values["override"]  # applies to one command only
        if self.init:
            del values["model"]  # not used: the model is that of `init`
        return {name: value for name, value in values.items() if value is not None}

    def to_toml(self) -> str:
        """The settings as a file for --config."""
        return "".join(f"{name} = {to_toml(value)}\n" for name, value in self.given().items())
