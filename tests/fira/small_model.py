"""A small model with large weights, and a function that saves it as a checkpoint."""

from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer
from torch import nn

from fira import FIRA
from fira.checkpoint.shard_index import TensorShard
from fira.data.tokenizer import train_tokenizer
from fira.models.fira import FiraConfig
from fira.models.registry import to_document
from tests.saving import save_checkpoint

M = TypeVar("M", bound=nn.Module)
CONFIG = FiraConfig(vocab_size=300, seq_len=12, d_model=16, n_head=2, num_layers=2, d_ff=24, dropout=0.1)
TEXT = "Die Bäume stehen im Wald. नमस्ते दुनिया! 🙂 " * 4


def perturbed(model: M, scale: float) -> M:
    """Add normal noise to all parameters, so that none has a special initial value such as zero; return the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def make_model(config: FiraConfig = CONFIG) -> FIRA:
    """Return a model in eval mode whose next token depends strongly on the previous ones."""
    torch.manual_seed(1)
    return perturbed(FIRA(config), 0.3).eval()


def make_tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT, "def main() -> None:\n    pass\n"], 300)


def save(folder: Path, model: FIRA, files: dict[str, bytes], document: dict | None = None) -> Path:
    """Save a checkpoint of step 7 in a run folder; `document` replaces its config.json."""
    weights = [TensorShard(name, p.detach(), 0, tuple(p.shape)) for name, p in model.named_parameters()]
    documents = {"config": document or to_document(model.config)}
    return save_checkpoint(folder / "checkpoints", 7, weights, [], documents, files, {"pp": 1, "dp": 1, "ep": 1}, 2)
