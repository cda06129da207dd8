"""Loss and gradients of a step equal those of TRL's SFTTrainer on the exported model, in fp32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fira.checkpoint.transformers_mapping import weight_names
from fira.data.tokenizer import TOKENIZER, load_tokenizer, train_tokenizer
from fira.huggingface.export_model import export
from fira.models.mooshak import MooshakConfig
from fira.models.registry import build, to_document
from fira.posttraining.chat_corpus import prepare_chats
from tests.chats import Messages, encode, make_chats
from tests.fira.small_model import perturbed, save
from tests.integration.test_reference_training import assembled
from tests.launch import run_function

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.slow

CONFIG = MooshakConfig(vocab_size=261, seq_len=64, d_model=24, num_layers=2, n_head=6, n_kv_head=3, d_ff=20)
MICROBATCH = 4  # of TRL


def as_messages(chat: Messages) -> dict[str, Any]:
    return {"messages": chat}


def as_completion(chat: Messages) -> dict[str, Any]:
    """The earlier turns are the prompt, whose answers are not trained."""
    return {"prompt": chat[:-1], "completion": chat[-1:]}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    train_tokenizer([], CONFIG.vocab_size).save(str(folder / TOKENIZER))
    torch.manual_seed(0)
    model = perturbed(build(CONFIG), 0.1)
    save(folder / "run", model, {TOKENIZER: (folder / TOKENIZER).read_bytes()})
    return export(folder / "run", folder / "llama", "llama")


def step_of_trl(folder: Path, records: list[dict[str, Any]], out: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step over all records, each in a row of its own."""
    losses, gradients = [], {}

    class Trainer(trl.SFTTrainer):
        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            losses.append(super().training_step(*arguments, **options))
            return losses[-1]

    class KeepGradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    config = trl.SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=MICROBATCH,
        gradient_accumulation_steps=-(-len(records) // MICROBATCH),
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        max_length=CONFIG.seq_len,
        assistant_only_loss="messages" in records[0],
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder),
        args=config,
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        callbacks=[KeepGradients()],
    )
    trainer.train()
    return float(sum(losses)), gradients


@pytest.mark.parametrize("form", [as_messages, as_completion])
def test_step_equals_that_of_trl(form: Callable[[Messages], dict[str, Any]], exported: Path, tmp_path: Path) -> None:
    tokenizer, chats = load_tokenizer(exported / TOKENIZER), make_chats(24)
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(form(chat)) + "\n" for chat in chats))
    corpus = prepare_chats(
        str(data), exported / TOKENIZER, CONFIG.vocab_size, CONFIG.seq_len, tmp_path / "cache", progress=False
    )
    packed = corpus.sources[0].train
    rows = packed.rows(range(len(packed)), len(packed))
    texts = {
        tuple(tokens[numbers == number].tolist())
        for tokens, numbers in zip(rows.tokens, rows.documents, strict=True)
        for number in range(numbers.max() + 1)
    }
    records = [form(chat) for chat in chats if tuple(encode(tokenizer, chat)[0]) in texts]  # the others are validation
    assert len(records) == 23
    case = {
        "model": to_document(CONFIG),
        "layout": [2, 1, 1],
        "folder": str(corpus.folder),
        "microbatch": 1,
        "batch": len(packed),
        "dtype": "float32",
        "weights": str(exported),
    }
    ranks = [rank[0] for rank in run_function(2, "tests.ranks.sft_ranks", "train_all", cases=[case])]
    loss, gradients = step_of_trl(exported, records, tmp_path / "trl")
    (ours,) = ranks[0]["steps"]
    assert ours[0] == pytest.approx(loss, rel=1e-6)
    found = assembled([{"gradients": rank["gradients"][0]} for rank in ranks], "gradients")
    assert found.keys() == weight_names(CONFIG, "llama").keys()
    for name, theirs in weight_names(CONFIG, "llama").items():
        torch.testing.assert_close(found[name], gradients[theirs].double(), rtol=0, atol=1e-6 * ours[2])
