"""Loss, metrics and gradients of a step equal those of TRL's DPOTrainer on the exported models, in fp32."""

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
from fira.training.config import DPO_LOSSES
from tests.fira.small_model import perturbed, save
from tests.integration.test_reference_training import assembled
from tests.launch import run_function
from tests.preferences import Preference, documents_in, encode_pair, make_preferences, write_preferences

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.slow

CONFIG = MooshakConfig(vocab_size=261, seq_len=96, d_model=24, num_layers=2, n_head=6, n_kv_head=3, d_ff=20)
BETA = 0.3
METRICS = ["chosen", "rejected", "accuracies", "margins"]  # of rewards


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The reference and the model, which has other weights."""
    folder = tmp_path_factory.mktemp("trl")
    train_tokenizer([], CONFIG.vocab_size).save(str(folder / TOKENIZER))
    result = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = perturbed(build(CONFIG), 0.1)
        save(folder / f"run-{seed}", model, {TOKENIZER: (folder / TOKENIZER).read_bytes()})
        result.append(export(folder / f"run-{seed}", folder / f"llama-{seed}", "llama"))
    return result


def step_of_trl(
    folders: list[Path], records: list[Preference], loss: str, out: Path
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Loss and metrics, and gradients, of one step over all records."""
    numbers: list[float] = []
    gradients: dict[str, torch.Tensor] = {}

    class Trainer(trl.DPOTrainer):
        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            value = super().training_step(*arguments, **options)
            found = self._metrics["train"]
            names = [*(f"rewards/{name}" for name in METRICS), "logps/chosen", "logps/rejected"]
            numbers.extend([float(value), *(found[name][-1] for name in names)])
            return value

    class KeepGradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    config = trl.DPOConfig(
        output_dir=str(out),
        loss_type=[loss.replace("-", "_")],
        beta=BETA,
        per_device_train_batch_size=len(records),
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        max_length=CONFIG.seq_len,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    reference, model = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    trainer = Trainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=transformers.AutoTokenizer.from_pretrained(folders[0]),
        callbacks=[KeepGradients()],
    )
    trainer.train()
    return numbers, gradients


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_step_equals_that_of_trl(loss: str, exported: list[Path], tmp_path: Path) -> None:
    tokenizer, preferences = load_tokenizer(exported[0] / TOKENIZER), make_preferences(16)
    data = write_preferences(tmp_path / "data.jsonl", preferences)
    corpus = prepare_chats(
        str(data),
        exported[0] / TOKENIZER,
        CONFIG.vocab_size,
        CONFIG.seq_len,
        tmp_path / "cache",
        progress=False,
        pairs=True,
    )
    packed = corpus.sources[0].train
    texts = {text for row in documents_in(packed.rows(range(len(packed)), len(packed))) for text in row}
    records = [one for one in preferences if {ids for ids, _ in encode_pair(tokenizer, one)} <= texts]
    assert len(records) == 15  # the other one is validation
    case = {
        "model": to_document(CONFIG),
        "layout": [2, 1, 1],
        "folder": str(corpus.folder),
        "loss": loss,
        "beta": BETA,
        "microbatch": 1,
        "batch": len(packed),
        "dtype": "float32",
        "weights": [str(folder) for folder in exported],
    }
    ranks = [rank[0] for rank in run_function(2, "tests.ranks.dpo_ranks", "train_all", cases=[case])]
    numbers, gradients = step_of_trl(exported, records, loss, tmp_path / "trl")
    value, _, norm, *metrics = ranks[0]["step"]
    assert value == pytest.approx(numbers[0], rel=1e-6)
    assert metrics == pytest.approx(numbers[1:], rel=1e-6, abs=1e-6 * abs(metrics[-1]))
    assert 0 < metrics[2] < 1
    found = assembled(ranks, "gradients")
    assert found.keys() == weight_names(CONFIG, "llama").keys()
    for name, theirs in weight_names(CONFIG, "llama").items():
        torch.testing.assert_close(found[name], gradients[theirs].double(), rtol=0, atol=1e-6 * norm)
