"""Saved models with a tokenizer, for the tests of exports to GGUF."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fira.checkpoint.shard_index import TensorShard
from fira.data.tokenizer import train_tokenizer
from fira.models.mooshak import MooshakConfig
from fira.models.registry import build, to_document
from fira.models.rish import RishConfig
from tests.fira.small_model import perturbed
from tests.saving import save_checkpoint

TEXT = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py")))
SMALL: dict[str, Any] = {"vocab_size": 320, "seq_len": 64, "d_model": 64, "n_head": 4, "d_ff": 96, "num_layers": 2}
MOOSHAK = MooshakConfig(**SMALL, n_kv_head=2)
OLMOE = RishConfig(
    **SMALL, n_kv_head=4, num_experts=6, top_k=2, max_position=64, rope_theta=1e4, norm_order="pre", norm_eps=1e-5
)
CONFIGS = {
    "llama": MOOSHAK,
    "llama-tied": replace(MOOSHAK, n_kv_head=None, tied=True, rope_theta=5e5),
    "llama-stretched": replace(MOOSHAK, rope_factor=8.0, rope_original=16),
    "olmoe": OLMOE,
}


def make_tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 310)  # fewer than the rows of the embedding


def save(folder: Path, config: Any, tokenizer: Tokenizer | None = None, scale: float = 0.1) -> Path:
    """Save a model with random weights as a step folder."""
    torch.manual_seed(0)
    weights = perturbed(build(config), scale).weights()
    shards = [TensorShard(name, value.detach(), 0, tuple(value.shape)) for name, value in weights.items()]
    files = {"tokenizer.json": (tokenizer or make_tokenizer()).to_str().encode()}
    return save_checkpoint(folder, 7, shards, [], {"config": to_document(config)}, files, {}, 2)
