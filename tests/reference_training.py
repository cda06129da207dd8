"""A plain training loop in one process: torch's AdamW, clip_grad_norm_ and cross_entropy, and written-out models.

No micro-batches, no ranks, no padding. Only the family's config is taken from fira; the initial weights are arguments.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference_models import FAMILIES, Parameters


@dataclass(frozen=True)
class Settings:
    """A training run. batch: sequences in a step. windows: how many windows of seq_len tokens an epoch has."""

    clip: float
    steps: int = 20
    batch: int = 4
    peak: float = 5e-4
    low: float = 5e-5
    warmup: int = 4
    weight_decay: float = 0.1
    windows: int = 30
    loader_seed: int = 3


def token_ids(vocab_size: int, length: int) -> np.ndarray:
    """A fixed stream of token ids with some structure to learn, int64."""
    rng = np.random.default_rng(5)
    return (rng.integers(0, 7, length).cumsum() % vocab_size).astype(np.int64)


def sequences(ids: np.ndarray, seq_len: int, s: Settings, step: int) -> Tensor:
    """The step's sequences with their last target, [batch, seq_len + 1]; the order is drawn per epoch from the seed."""
    rows = []
    for number in range((step - 1) * s.batch, step * s.batch):
        epoch, position = number // s.windows, number % s.windows
        order = np.random.default_rng([s.loader_seed, epoch]).permutation(s.windows)
        start = order[position] * seq_len
        rows.append(ids[start : start + seq_len + 1])
    return torch.tensor(np.stack(rows))


def learning_rate(step: int, s: Settings) -> float:
    """Linear warm-up to `peak`, then a half cosine to `low` at the last step; steps count from 1."""
    if step <= s.warmup:
        return step / s.warmup * s.peak
    angle = math.pi * (step - s.warmup) / (s.steps - s.warmup)
    return s.low + (s.peak - s.low) * (math.cos(angle) + 1) / 2


def is_decayed(name: str, value: Tensor) -> bool:
    """Whether weight decay applies: to matrices that are no embeddings, with one dim more if they are experts'."""
    table = name.endswith(("token.weight", "position.weight"))
    return value.dim() - (name.rsplit(".", 1)[1] in ("w1", "b1", "w2", "b2")) >= 2 and not table


def train(family: str, config: Any, initial: Parameters, ids: np.ndarray, s: Settings) -> dict[str, Any]:
    """Train in float64. "steps": loss, auxiliary loss, gradient norm and learning rate of each; "weights": the last."""
    model = FAMILIES[family]
    p = {name: value.double().clone().requires_grad_() for name, value in initial.items()}
    groups = [
        {"params": [v for n, v in p.items() if is_decayed(n, v)], "weight_decay": s.weight_decay},
        {"params": [v for n, v in p.items() if not is_decayed(n, v)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    rows = []
    for step in range(1, s.steps + 1):
        batch = sequences(ids, config.seq_len, s, step)
        outputs = [model(row[:-1], p, config) for row in batch]
        logits, aux = torch.cat([o[0] for o in outputs]), torch.stack([o[1] for o in outputs]).mean()
        loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + aux).backward()
        norm = torch.nn.utils.clip_grad_norm_(p.values(), s.clip)
        lr = learning_rate(step, s)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        rows.append([loss.item(), aux.item(), norm.item(), lr])
    return {"steps": rows, "weights": {name: value.detach() for name, value in p.items()}}


def validate(family: str, config: Any, weights: Parameters, ids: np.ndarray) -> float:
    """Mean loss in nats per token of all ids but the first; the last row is padded: rish's theta depends on T."""
    total = 0.0
    for start in range(0, len(ids) - 1, config.seq_len):
        row = torch.tensor(ids[start : start + config.seq_len + 1])
        padded = F.pad(row[:-1], (0, config.seq_len + 1 - len(row)))
        logits, _ = FAMILIES[family](padded, weights, config)
        total += F.cross_entropy(logits[: len(row) - 1], row[1:], reduction="sum").item()
    return total / (len(ids) - 1)
