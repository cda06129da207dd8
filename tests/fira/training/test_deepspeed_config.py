"""Translation of DeepSpeed configurations into flags."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fira import cli
from fira.commands.train import add_arguments
from fira.errors import UserError
from fira.training.deepspeed_config import translate

HUGGING_FACE = {  # the ZeRO-3 example of transformers' documentation
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
ADAM = {"type": "AdamW", "params": {"lr": 0.002}}


def settings(document: dict[str, Any], ranks: int | None = 4, **given: Any) -> dict[str, Any]:
    return translate(document, ranks, given).settings


def test_a_file_of_automatic_values_leaves_the_flags_as_they_are():
    found = translate(HUGGING_FACE, 4, {})
    assert found.settings == {
        **{"optimizer": "adamw", "lr_schedule": "wsd", "lr_decay": 0.0, "min_lr": 0.0, "warmup_shape": "log"},
        **{"pp": 1, "shard": "parameters"},
    }
    assert found.ignored == [
        *("zero_optimization.overlap_comm", "zero_optimization.reduce_bucket_size", "steps_per_print"),
        *("wall_clock_breakdown", "fp16.loss_scale", "fp16.loss_scale_window"),
        *("fp16.initial_scale_power", "fp16.hysteresis"),
    ]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"train_batch_size": 32}, {"batch_size": 32}),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2}, {"batch_size": 32, "micro_batch_size": 2}),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 4}, {"batch_size": 32, "micro_batch_size": 2}),
        (
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
            {"batch_size": 24, "micro_batch_size": 2},
        ),
        ({"train_micro_batch_size_per_gpu": 2}, {"batch_size": 8, "micro_batch_size": 2}),
        ({"train_micro_batch_size_per_gpu": 2, "train_batch_size": "auto"}, {"micro_batch_size": 2}),
        ({"gradient_accumulation_steps": 3}, {}),
        ({"gradient_clipping": 0.5, "seed": 7}, {"clip": 0.5, "seed": 7}),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, {"precision": "bf16"}),
        ({"fp16": {"enabled": True}}, {"precision": "fp16"}),
        ({"bf16": {"enabled": False}}, {"precision": "fp32"}),
        ({"bf16": {"enabled": "auto"}}, {}),
        ({"zero_optimization": {"stage": 0}}, {"pp": 1, "shard": "none"}),
        ({"zero_optimization": {"stage": 1}}, {"pp": 1, "shard": "optimizer"}),
        ({"zero_optimization": {"stage": 2}}, {"pp": 1, "shard": "optimizer"}),
        ({"activation_checkpointing": {"partition_activations": True}}, {"recompute": "full"}),
        (
            {"optimizer": ADAM},
            {"optimizer": "adamw", "lr": 0.002, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
        ),
        (
            {
                "optimizer": {"type": "Muon", "params": {"adam_lr": 0.003, "muon_lr": 0.02, "betas": "auto"}},
                "scheduler": None,
            },
            {"optimizer": "muon", "lr": 0.003, "weight_decay": 0.0, "eps": 1e-10},
        ),
    ],
)
def test_values(document: dict[str, Any], expected: dict[str, Any]):
    assert settings(document) == expected


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (
            {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_type": "linear"}},
            {"lr": 0.002, "min_lr": 0.0, "warmup": 5, "warmup_shape": "linear", "lr_schedule": "wsd", "lr_decay": 0.0},
        ),
        (
            {"type": "WarmupDecayLR", "params": {"total_num_steps": 90, "warmup_max_lr": 0.01}},
            {"lr": 0.01, "min_lr": 0, "warmup": 1000, "warmup_shape": "log", "lr_schedule": "linear", "steps": 90},
        ),
        (
            {"type": "WarmupCosineLR", "params": {"total_num_steps": 90, "warmup_num_steps": 9, "cos_min_ratio": 0.1}},
            {"lr": 0.002, "min_lr": 2e-4, "warmup": 9, "warmup_shape": "log", "lr_schedule": "cosine", "steps": 90},
        ),
    ],
)
def test_schedulers(scheduler: dict[str, Any], expected: dict[str, Any]):
    found = settings({"scheduler": scheduler, "optimizer": ADAM})  # the optimizer is read first
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type Lamb: no counterpart"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}}, "adam_w_mode"),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "optimizer.params.amsgrad true"),
        ({"optimizer": {"type": "AdamW", "params": {"max_coeff": 1}}}, "optimizer.params.max_coeff: no counterpart"),
        ({"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02}}}, "give adam_lr"),
        ({"optimizer": 3}, "optimizer: give an object"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type OneCycle"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.1}}}, "warmup_min_lr 0.1"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both enabled"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled: give true, false or"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled: give true, false or"),
        ({"train_batch_size": math.inf}, "train_batch_size: give a number of at least 1"),
        ({"scheduler": {"type": ["WarmupLR"]}}, "scheduler.type"),
        ({"zero_optimization": {"stage": [1]}}, "give 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 4}}, "give 0, 1, 2 or 3, not 4"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients true"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning: no counterpart"),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention: no counterpart"),
        ({"gradient_clipping": "high"}, "gradient_clipping: give a number"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype bf16"),
        ({"train_batch_size": 0}, "train_batch_size: give a number of at least 1"),
        ({"train_batch_size": 30, "gradient_accumulation_steps": 4}, "not divisible by 4 accumulation steps × 4 ranks"),
        (
            {"train_batch_size": 30, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
            "= 2 × 4 × 4 = 32",
        ),
    ],
)
def test_what_changes_the_result_without_a_counterpart_is_refused(document: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        settings(document)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_disabled_block_is_accepted():
    assert settings({"curriculum_learning": {"enabled": False}, "elasticity": {}}) == {}


def test_the_number_of_ranks_is_needed_only_for_an_unknown_batch():
    known = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "train_batch_size": 12}
    assert settings(known, ranks=None)["batch_size"] == 12
    with pytest.raises(UserError, match="the number of ranks is not known"):
        settings({**known, "train_batch_size": "auto"}, ranks=None)


def test_accumulation_divides_the_batch_of_the_flags():
    found = settings({"gradient_accumulation_steps": 2}, ranks=2, batch_size=12)
    assert found == {"batch_size": 12, "micro_batch_size": 3}


def parse(*arguments: str) -> Any:
    parser = cli.Parser("", "train")
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_later_flags_override_the_file_and_the_file_earlier_ones(tmp_path: Path):
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps({"train_batch_size": 8, "optimizer": ADAM, "steps_per_print": 5}))
    found = parse("--lr", "0.1", "--clip", "3", "--deepspeed", str(file), "--batch-size", "4", "--local_rank=1")
    assert (found.lr, found.clip, found.batch_size, found.beta2) == (0.002, 3.0, 4, 0.999)
    assert found.deepspeed == f"--deepspeed {file}: without counterpart: steps_per_print"


def test_stage_0_overrides_earlier_sharding(tmp_path: Path):
    file = tmp_path / "ds_config.json"
    file.write_text('{"zero_optimization": {"stage": 0}}')
    assert parse("--shard", "optimizer", "--deepspeed", str(file)).shard == "none"


def test_an_invalid_file_is_reported_by_its_name(tmp_path: Path):
    file = tmp_path / "ds_config.json"
    file.write_text('{"train_batch_size": 8')
    with pytest.raises(UserError, match=r"ds_config.json is not valid JSON"):
        parse("--deepspeed", str(file))
    file.write_text('{"optimizer": {"type": "SGD"}}')
    with pytest.raises(UserError, match=r"--deepspeed .*ds_config.json: optimizer.type SGD"):
        parse("--deepspeed", str(file))
    file.write_text('{"gradient_clipping": -1}')
    with pytest.raises(UserError, match=r"ds_config.json: argument --clip"):
        parse("--deepspeed", str(file))


def test_the_logarithmic_warmup_is_deepspeeds():
    """Values of DeepSpeed's WarmupLR: log(iteration + 1) / log(warmup_num_steps), iterations counted from 0."""
    from fira.optim.lr_schedule import learning_rate

    rates = [learning_rate(step, 100, 2.0, 2.0, 8, "linear", shape="log") for step in range(1, 12)]
    expected = [2.0 * min(1.0, math.log(iteration + 1, 8)) for iteration in range(1, 12)]
    assert rates == pytest.approx(expected)
