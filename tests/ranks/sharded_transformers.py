"""Train the transformers classes under DeepSpeed, Accelerate and Trainer, on ranks of torch's gloo backend.

`torchrun sharded_transformers.py CASES METHOD…`, where METHOD is ddp, fsdp2, trainer, zero1, zero2 or zero3. CASES is a
folder with `settings.json` and one exported model per family. Losses and gradient norms of each step, by method and
family, are written to `results.json` there.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

import fira.huggingface  # noqa: F401 (registers the classes)
from tests.reference_training import Settings, sequences, token_ids

Steps = list[tuple[float, float]]  # loss and gradient norm


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).train()


def adamw(model: Any, s: Settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=s.peak, betas=(0.9, 0.95), eps=1e-8, weight_decay=s.weight_decay)


def all_batches(config: Any, s: Settings) -> list[Tensor]:
    """Token ids of each step, [batch, length]."""
    ids = token_ids(config.vocab_size, s.windows * config.shape["seq_len"] + 1)
    return [sequences(ids, config.shape["seq_len"], s, step)[:, :-1] for step in range(1, s.steps + 1)]


def batches(config: Any, s: Settings) -> list[Tensor]:
    """This rank's part of them, [batch / ranks, length]."""
    return [step.chunk(dist.get_world_size())[dist.get_rank()].contiguous() for step in all_batches(config, s)]


def mean(loss: Tensor) -> float:
    """The mean over the ranks."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def with_accelerate(accelerator: Accelerator, folder: Path, s: Settings, sharded: bool) -> Steps:
    loaded, steps = load(folder), []
    model, optimizer = accelerator.prepare(loaded, adamw(loaded, s))
    assert all(isinstance(parameter, DTensor) == sharded for parameter in model.parameters())
    for ids in batches(loaded.config, s):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((mean(loss), float(norm)))
    AcceleratorState._reset_state(reset_partial_state=True)
    return steps


def ddp(folder: Path, s: Settings) -> Steps:
    return with_accelerate(Accelerator(cpu=True), folder, s, sharded=False)


def fsdp2(folder: Path, s: Settings) -> Steps:
    """With the variables that `accelerate launch` sets: the blocks are sharded, and only rank 0 reads the weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_VERSION", "2")
        patch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
        patch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
        accelerator = Accelerator(cpu=True)
        # On CPUs, Accelerate ignores these variables and uses DDP.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        return with_accelerate(accelerator, folder, s, sharded=True)


def trainer(folder: Path, s: Settings) -> Steps:
    """Trainer, which uses DDP."""
    model, steps = load(folder), []
    dataset = [{"input_ids": row, "labels": row} for step in all_batches(model.config, s) for row in step]

    class Record(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                steps.append((logs["loss"], float(logs["grad_norm"])))

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=s.batch // dist.get_world_size(),
        train_sampling_strategy="sequential",
        max_steps=s.steps,
        learning_rate=s.peak,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=s.weight_decay,
        max_grad_norm=s.clip,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Record()]).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return steps


def zero(stage: int) -> Callable[[Path, Settings], Steps]:
    def train(folder: Path, s: Settings) -> Steps:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # it would be compiled; gloo has the same operations
        )
        config = {
            "train_micro_batch_size_per_gpu": s.batch // dist.get_world_size(),
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": s.clip,
            "steps_per_print": 10**9,
        }
        used = HfDeepSpeedConfig(config)  # with stage 3, from_pretrained shards the weights while it reads them
        model = load(folder)
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model, s), config=config)
        del used
        steps = []
        for ids in batches(model.config, s):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            steps.append((mean(loss), float(engine.get_global_grad_norm())))
        engine.destroy()
        return steps

    return train


METHODS = {"ddp": ddp, "fsdp2": fsdp2, "trainer": trainer} | {f"zero{stage}": zero(stage) for stage in (1, 2, 3)}


def main(cases: Path, methods: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("gloo")
    settings = Settings(**json.loads((cases / "settings.json").read_text()))
    families = sorted(path.parent for path in cases.glob("*/config.json"))
    results = {name: {folder.name: METHODS[name](folder, settings) for folder in families} for name in methods}
    if dist.get_rank() == 0:
        (cases / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
