"""Losses and gradients of GRPO and of distillation equal those of TRL's trainers, in fp32."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from fira.checkpoint.transformers_mapping import weight_names
from fira.data.tokenizer import TOKENIZER, train_tokenizer
from fira.huggingface.export_model import export
from fira.models.mooshak import MooshakConfig
from fira.models.registry import build, to_document
from fira.posttraining.distillation import divergences
from tests.fira.small_model import perturbed, save
from tests.integration.test_grpo_parity import documents
from tests.integration.test_reference_training import assembled
from tests.launch import run_function
from tests.ranks.grpo_ranks import Prompts, reward

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.slow

CONFIG = MooshakConfig(vocab_size=261, seq_len=64, d_model=24, num_layers=2, n_head=6, n_kv_head=3, d_ff=20)
GROUP = BATCH = 6  # one sequence of prompts


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    train_tokenizer([], CONFIG.vocab_size).save(str(folder / TOKENIZER))
    torch.manual_seed(0)
    save(folder / "run", perturbed(build(CONFIG), 0.1), {TOKENIZER: (folder / TOKENIZER).read_bytes()})
    return export(folder / "run", folder / "llama", "llama")


def step_of_trl(folder: Path, step: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    """The gradients of a step of TRL on the answers that our step has sampled."""
    sampled = documents([np.array(part) for part in step["rows"]])
    references = Prompts(CONFIG.seq_len, CONFIG.vocab_size)._documents(
        int(np.random.default_rng([3, 0]).permutation(4)[0])
    )
    prompts, answers, advantages = [], [], []
    for number, original in enumerate(references):
        rewards = [reward(sequence[number][1], original.answer) for sequence in sampled]
        mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
        for sequence, value in zip(sampled, rewards, strict=True):
            prompts.append(torch.tensor(sequence[number][0]).flip(0))
            answers.append(torch.tensor(sequence[number][1]))
            advantages.append((value - mean) / (deviation + 1e-4))  # as in TRL's _generate_and_score_completions
    count = len(answers)
    config = trl.GRPOConfig(
        output_dir=str(out),
        loss_type="grpo",
        beta=0.0,
        num_generations=count,
        per_device_train_batch_size=count,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": "x"}] * count),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": pad_sequence(prompts, batch_first=True).flip(1),  # padding on the left
        "prompt_mask": pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True).flip(1),
        "completion_ids": pad_sequence(answers, batch_first=True),
        "completion_mask": pad_sequence([torch.ones_like(a) for a in answers], batch_first=True),
        "advantages": torch.tensor(advantages),
    }
    trainer.compute_loss(trainer.model, inputs).backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_gradients_of_grpo_equal_those_of_trl(exported: Path, tmp_path: Path) -> None:
    case = {"model": to_document(CONFIG), "layout": [2, 1, 1], "group": GROUP, "microbatch": 2, "batch": BATCH}
    case |= {"schedule": "1f1b", "weights": str(exported), "dtype": "float32"}
    ranks = [rank[0] for rank in run_function(2, "tests.ranks.grpo_ranks", "train_all", cases=[case])]
    gradients = step_of_trl(exported, ranks[0], tmp_path)
    _, _, norm, *_ = ranks[0]["step"]
    found = assembled(ranks, "gradients")
    assert found.keys() == weight_names(CONFIG, "llama").keys()
    for name, theirs in weight_names(CONFIG, "llama").items():
        torch.testing.assert_close(found[name], gradients[theirs].double(), rtol=0, atol=1e-6 * norm)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence_equals_that_of_trl(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    torch.manual_seed(1)
    student, teacher = torch.randn(2, 3, 7, 50).mul(2)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=1.7, reduction="sum")
    logs = [(logits / 1.7).log_softmax(-1).flatten(0, 1) for logits in (teacher, student)]
    torch.testing.assert_close(divergences(*logs, beta).sum(), theirs, rtol=1e-6, atol=0)
