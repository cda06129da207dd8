"""Train the transformers classes under DeepSpeed or Accelerate on ranks of torch's gloo backend.

`torchrun sharded_transformers.py METHOD FOLDER`, where METHOD is zero0 to zero3, ddp or fsdp2. The folder has a file
`cases.json`; the losses by family are written to `METHOD.json`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fira.huggingface import FiraLMConfig, FiraLMForCausalLM, RishAICausalLM, RishAIConfig
from tests.reference_training import Settings, learning_rate, sequences, token_ids


class DeepSpeedTraining:
    """Training by DeepSpeed's engine."""

    def __init__(self, model: Any, s: Settings, stage: int) -> None:
        import deepspeed

        optimizer = {"lr": s.peak, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True}
        config = {
            "train_batch_size": s.batch,
            "optimizer": {"type": "AdamW", "params": optimizer},
            "zero_optimization": {"stage": stage},
            "gradient_clipping": s.clip,
        }
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(self, ids: Tensor, lr: float) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        loss = self.engine(input_ids=ids[:, :-1], labels=ids).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()


class AccelerateTraining:
    """Training by Accelerate with DDP or FSDP2."""

    def __init__(self, model: Any, s: Settings, method: str) -> None:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        plugin = None
        if method == "fsdp2":
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
            )
        self.accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        optimizer = torch.optim.AdamW(model.parameters(), lr=s.peak, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.clip = s.clip

    def step(self, ids: Tensor, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.model(input_ids=ids[:, :-1], labels=ids).loss
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def train(method: str, case: dict[str, Any]) -> list[float]:
    """Return the losses of all steps, each the mean over the ranks."""
    s, shape = Settings(**case["settings"]), case["model"]
    rish = shape["family"] == "rish"
    model = (RishAICausalLM if rish else FiraLMForCausalLM)((RishAIConfig if rish else FiraLMConfig)(shape=shape))
    weights = {f"model.{name}": torch.tensor(values) for name, (_, values) in case["initial"].items()}
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    assert all(name.endswith(("balance", "project.weight")) for name in left.missing_keys), left.missing_keys
    model.train()
    zero = method.startswith("zero")
    training = DeepSpeedTraining(model, s, int(method[-1])) if zero else AccelerateTraining(model, s, method)
    ids = token_ids(shape["vocab_size"], s.windows * shape["seq_len"] + 1)
    share, losses = s.batch // dist.get_world_size(), []
    for step in range(1, s.steps + 1):
        batch = sequences(ids, shape["seq_len"], s, step)
        loss = training.step(batch.narrow(0, dist.get_rank() * share, share), learning_rate(step, s))
        dist.all_reduce(loss)
        losses.append(float(loss) / dist.get_world_size())
    return losses


def main(method: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("gloo")
    cases = json.loads(Path(folder, "cases.json").read_text())
    losses = {name: train(method, case) for name, case in cases.items()}
    if dist.get_rank() == 0:
        Path(folder, f"{method}.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
