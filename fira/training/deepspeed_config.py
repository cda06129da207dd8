"""Translation of a DeepSpeed configuration, a ds_config.json, into settings of a training run.

The value "auto" leaves a setting as the flags give it, as in Hugging Face's Trainer, and so does a missing key. A value
that a given block leaves out is DeepSpeed's default. A key without a counterpart is ignored if it changes only memory,
speed or output; otherwise the file is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fira.errors import UserError

AUTO = "auto"
SHARD = {0: "none", 1: "optimizer", 2: "optimizer", 3: "parameters"}  # by ZeRO stage

# Keys that change memory, speed or output of a run, but not what it computes.
IGNORED = {
    *("steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "flops_profiler", "comms_logger"),
    *("tensorboard", "wandb", "csv_monitor", "comet", "communication_data_type", "prescale_gradients"),
    *("gradient_predivide_factor", "sparse_gradients", "disable_allgather", "fp32_allreduce", "aio", "autotuning"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "checkpoint", "dataloader_drop_last"),
    *("compile", "nebula", "hybrid_engine", "graph_harvesting", "use_node_local_storage"),
    *("tensor_parallel", "log_level"),
    *("disable_python_gc", "use_data_before_expert_parallelism", "seq_parallel_communication_data_type"),
}
# Blocks that change what is computed, unless "enabled" is false or missing.
REFUSED_IF_ENABLED = {
    "amp": 'use "bf16" or "fp16"',
    "curriculum_learning": "sequences have one length",
    "data_efficiency": "sequences have one length, and no token is dropped",
    "progressive_layer_drop": "no layer is dropped",
    "elasticity": "use --elastic, which keeps the batch size",
    "eigenvalue": "weights are not quantized in training",
    "quantize_training": "weights are not quantized in training",
}
ZERO_REFUSED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
OPTIMIZER_IGNORED = {"torch_adam", "fused", "ns_method", "freeze_step"}
WARMUP_STEPS = 1000  # DeepSpeed's default of warmup_num_steps


@dataclass(frozen=True)
class Translation:
    """settings: values by name, as in a --config file. ignored: names of the keys without a counterpart."""

    settings: dict[str, Any]
    ignored: list[str]


def translate(document: dict[str, Any], ranks: int | None, given: Mapping[str, Any]) -> Translation:
    """Translate a configuration.

    Args:
        document: the content of the JSON file.
        ranks: number of ranks, each a replica of the model as in DeepSpeed; None: not known yet.
        given: the values of the flags so far; a missing value or None is that of the recipe.

    Raises:
        UserError: for a value that is invalid, or that has no counterpart and changes the result. Its message begins
            with the name of the key.
    """
    settings: dict[str, Any] = {}
    ignored: list[str] = []
    readers = {
        "optimizer": _optimizer,
        "zero_optimization": _zero,
        "activation_checkpointing": _activation_checkpointing,
        "data_types": _data_types,
    }
    for key, value in document.items():
        if value is None or key in (*_BATCH, "bf16", "fp16", "scheduler"):
            continue
        if key in readers:
            readers[key](_Block(key, value, ignored), settings)
        elif key == "gradient_clipping":
            _set(settings, "clip", _number(key, value))
        elif key == "seed":
            _set(settings, "seed", _number(key, value))
        elif key in REFUSED_IF_ENABLED:
            if isinstance(value, dict) and not value.get("enabled"):
                continue
            raise UserError(f"{key}: no counterpart: {REFUSED_IF_ENABLED[key]}; remove the block")
        elif key in IGNORED:
            ignored.append(key)
        else:
            raise UserError(f"{key}: no counterpart, and it may change the result; remove it")
    if document.get("scheduler") is not None:  # after the optimizer, whose learning rate is the default of its peak
        _scheduler(_Block("scheduler", document["scheduler"], ignored), settings, given)
    _precision(document, ignored, settings)
    _batch(document, ranks, given.get("batch_size"), ignored, settings)
    return Translation(settings, ignored)


class _Block:
    """An object of the file. Keys that have been read are removed; `ignore` adds the others to the ignored ones."""

    def __init__(self, name: str, value: Any, ignored: list[str]) -> None:
        if not isinstance(value, dict):
            raise UserError(f"{name}: give an object, not {value!r}")
        self.name, self.ignored = name, ignored
        self._values = dict(value)

    def take(self, key: str, default: Any = None) -> Any:
        """Remove a value and return it."""
        return self._values.pop(key, default)

    def number(self, key: str, default: float | None = None) -> Any:
        """Remove a number and return it; "auto": None."""
        return _number(f"{self.name}.{key}", self.take(key, default))

    def block(self, key: str) -> "_Block":
        return _Block(f"{self.name}.{key}", self.take(key, {}), self.ignored)

    def refuse(self, key: str, value: Any, remedy: str) -> None:
        raise UserError(f"{self.name}.{key} {value}: {remedy}")

    def ignore(self, only: set[str] | None = None) -> None:
        """Ignore the remaining keys, or those in `only`. Raises UserError for another one."""
        for key in self._values:
            if only is not None and key not in only:
                raise UserError(f"{self.name}.{key}: no counterpart, and it may change the result; remove it")
            self.ignored.append(f"{self.name}.{key}")


def _number(name: str, value: Any) -> Any:
    """Return a number; None for "auto" and for a missing value."""
    if value is None or value == AUTO:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f'{name}: give a number or "auto", not {value!r}')
    return value


def _set(settings: dict[str, Any], name: str, value: Any) -> None:
    if value is not None:
        settings[name] = value


def _optimizer(block: _Block, settings: dict[str, Any]) -> None:
    kind, params = block.take("type", ""), block.block("params")
    name = kind.lower() if isinstance(kind, str) else ""
    if name not in ("adam", "adamw", "muon"):
        raise UserError(f"{block.name}.type {kind}: no counterpart; choose AdamW, Adam or Muon")
    settings["optimizer"] = "muon" if name == "muon" else "adamw"
    _set(settings, "lr", params.number("lr", None if name == "muon" else 1e-3))
    decay = params.number("weight_decay", 0.0)
    _set(settings, "weight_decay", decay)
    betas = params.take("betas", [0.9, 0.95] if name == "muon" else [0.9, 0.999])
    if betas != AUTO:
        if not isinstance(betas, list) or len(betas) != 2:
            raise UserError(f'optimizer.params.betas: give two numbers or "auto", not {betas!r}')
        for setting, beta in zip(("beta1", "beta2"), betas, strict=True):
            _set(settings, setting, _number("optimizer.params.betas", beta))
    _set(settings, "eps", params.number("eps", 1e-10 if name == "muon" else 1e-8))
    if name == "adam" and params.take("adam_w_mode", True) is False and decay != 0:
        params.refuse("adam_w_mode", "false", "no counterpart: weight decay is not a part of the gradient; use AdamW")
    for key, own in (("bias_correction", True), ("amsgrad", False), ("adam_w_mode", True)):
        if (value := params.take(key, own)) != own and (key, name) != ("adam_w_mode", "adam"):
            params.refuse(key, str(value).lower(), f"no counterpart; {str(own).lower()} is used")
    if name == "muon":
        _muon(params, settings, block.ignored)
    params.ignore(only=OPTIMIZER_IGNORED)
    block.ignore(only={"legacy_fusion"})


MUON_LR = "optimizer.params.muon_lr (--optimizer muon has one --lr; its updates of matrices have the size of AdamW's)"


def _muon(params: _Block, settings: dict[str, Any], ignored: list[str]) -> None:
    """Set the learning rate, which has the scale of AdamW's for matrices as well, and check the momentum."""
    _set(settings, "lr", params.number("adam_lr"))
    if params.number("muon_lr") is not None:
        if "lr" not in settings:
            raise UserError("optimizer.params: give adam_lr; muon_lr is for updates of another size")
        ignored.append(MUON_LR)
    if (momentum := params.number("momentum", 0.95)) not in (None, 0.95):
        params.refuse("momentum", momentum, "no counterpart; 0.95 is used")


def _scheduler(block: _Block, settings: dict[str, Any], given: Mapping[str, Any]) -> None:
    kind, params = block.take("type"), block.block("params")
    schedules = {"WarmupLR": "wsd", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
    if not isinstance(kind, str) or kind not in schedules:
        raise UserError(f"scheduler.type {kind}: no counterpart; choose {', '.join(schedules)}")
    settings["lr_schedule"] = schedules[kind]
    warmup = params.number("warmup_num_steps", WARMUP_STEPS)
    _set(settings, "warmup", warmup)
    shape = params.take("warmup_type", "log")
    if warmup != 0 and shape != AUTO:
        settings["warmup_shape"] = shape
    if kind == "WarmupCosineLR":
        lowest, start = params.number("cos_min_ratio"), params.number("warmup_min_ratio", 0.0)
        if start:
            params.refuse("warmup_min_ratio", f"{start:g}", "no counterpart; the warmup begins at 0")
        peak = settings.get("lr", given.get("lr"))
        if lowest and peak is None:
            params.refuse("cos_min_ratio", f"{lowest:g}", "give optimizer.params.lr, or --lr before --deepspeed")
        settings["min_lr"] = (1e-4 if lowest is None else lowest) * (peak or 0.0)
    else:
        peak = params.number("warmup_max_lr", None if kind == "WarmupLR" else 1e-3)
        start = params.number("warmup_min_lr", 0.0)
        if start:
            params.refuse("warmup_min_lr", f"{start:g}", "no counterpart; the warmup begins at 0")
        _set(settings, "lr", peak)  # DeepSpeed's scheduler replaces the optimizer's learning rate
        if kind == "WarmupLR":
            settings["lr_decay"] = 0.0
        settings["min_lr"] = 0.0
    if kind != "WarmupLR":
        _set(settings, "steps", params.number("total_num_steps"))
    params.ignore(only={"last_batch_iteration"})
    block.ignore(only=set())


def _precision(document: dict[str, Any], ignored: list[str], settings: dict[str, Any]) -> None:
    """Set the precision if the file has one of the blocks."""
    blocks = {name: _Block(name, document[name], ignored) for name in ("bf16", "fp16") if document.get(name)}
    enabled = {name: block.take("enabled", False) for name, block in blocks.items()}
    for block in blocks.values():
        block.ignore()
    for name, value in enabled.items():
        if not (isinstance(value, bool) or value == AUTO):
            raise UserError(f'{name}.enabled: give true, false or "auto", not {value!r}')
    chosen = [name for name, value in enabled.items() if value is True]
    if len(chosen) > 1:
        raise UserError("bf16 and fp16 are both enabled; enable one of them")
    if chosen or (enabled and AUTO not in enabled.values()):
        settings["precision"] = chosen[0] if chosen else "fp32"


def _zero(block: _Block, settings: dict[str, Any]) -> None:
    stage = block.take("stage", 0)
    for key in ZERO_REFUSED:
        if block.take(key, False):
            block.refuse(key, "true", "no counterpart: replicas exchange values that are not quantized; remove it")
    if stage == AUTO:
        return
    if isinstance(stage, bool) or not isinstance(stage, int) or stage not in SHARD:
        raise UserError(f"zero_optimization.stage: give 0, 1, 2 or 3, not {stage!r}")
    settings["pp"] = 1  # every rank is a replica
    settings["shard"] = SHARD[stage]
    block.ignore()


def _activation_checkpointing(block: _Block, settings: dict[str, Any]) -> None:
    settings["recompute"] = "full"
    block.ignore()


def _data_types(block: _Block, settings: dict[str, Any]) -> None:
    if (kind := block.take("grad_accum_dtype")) not in (None, AUTO, "fp32"):
        block.refuse("grad_accum_dtype", kind, "no counterpart; gradients are summed in fp32")
    block.ignore(only=set())


_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _batch(
    document: dict[str, Any], ranks: int | None, batch_size: int | None, ignored: list[str], settings: dict[str, Any]
) -> None:
    """Set batch and micro-batch: train_batch_size = micro-batch × accumulation steps × ranks."""
    total, micro, accumulation = (_count(key, document.get(key)) for key in _BATCH)
    if micro and not any(document.get(key) for key in (_BATCH[0], _BATCH[2])):
        accumulation = 1  # DeepSpeed's default
    total = total or (None if micro and accumulation else batch_size)
    if micro and accumulation and ranks is None and total is None:
        raise UserError(f"{_BATCH[0]}: the number of ranks is not known; give a number")
    if micro and accumulation and ranks is not None:
        product = micro * accumulation * ranks
        if total not in (None, product):
            raise UserError(
                f"{_BATCH[0]} {total} is not micro-batch × accumulation steps × ranks "
                f"= {micro} × {accumulation} × {ranks} = {product}"
            )
        total = product
    elif total and accumulation and ranks is not None:
        micro, rest = divmod(total, accumulation * ranks)
        if rest:
            raise UserError(
                f"{_BATCH[0]} {total} is not divisible by {accumulation} accumulation steps × {ranks} ranks"
            )
    elif accumulation and not micro:
        ignored.append(_BATCH[2])
    if document.get(_BATCH[0]) not in (None, AUTO) or (micro and accumulation):
        _set(settings, "batch_size", total)
    _set(settings, "micro_batch_size", micro)


def _count(name: str, value: Any) -> int | None:
    number = _number(name, value)
    if number is not None and (not 1 <= number < math.inf or number != int(number)):
        raise UserError(f"{name}: give a number of at least 1, not {number}")
    return None if number is None else int(number)
