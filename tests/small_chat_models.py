"""A small model of each family for chats of bytes, and how closely its results agree with a plain loop."""

from typing import Any

from fira.models.blues import BluesConfig
from fira.models.fira import FiraConfig
from fira.models.microrwkv import MicroRWKVConfig
from fira.models.mooshak import MooshakConfig
from fira.models.rish import RishConfig

SMALL: dict[str, Any] = {"vocab_size": 261, "seq_len": 96, "d_model": 12, "num_layers": 2}
MODELS = {
    "fira": FiraConfig(**SMALL, n_head=3, d_ff=10, dropout=0.0, switch_coefficient=0.1, z_coefficient=0.01),
    "rish": RishConfig(**SMALL, n_head=3, n_kv_head=1, d_ff=10, num_experts=4, top_k=2, max_position=20),
    "mooshak": MooshakConfig(**SMALL, n_head=3, n_kv_head=3, d_ff=10),
    "blues": BluesConfig(**SMALL, n_head=3, n_kv_head=1, d_ff=10, noise=0.0, dropout=0.0, aux_coefficient=0.1),
    "microrwkv": MicroRWKVConfig(**SMALL, n_head=3, n_group=2, window=5, d_moe=10, top_k=2, aux_coefficient=0.1),
}
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
