"""A plain training loop for adapters in one process: every adapted weight is a dense matrix W + α/r · B A.

The models are those of `tests.reference_models`, which have no adapters. Autograd computes the gradients G of the dense
matrices only; those of A and B follow by the chain rule: ∂A = α/r · Bᵀ G and ∂B = α/r · G Aᵀ.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.reference_models import FAMILIES, Parameters
from tests.reference_training import Settings, learning_rate, sequences


def pairs(adapters: Parameters) -> dict[str, tuple[str, str]]:
    """The names of A and B by the name of the weight, from the rules of the documentation."""
    found = {}
    for a in adapters:
        if a.endswith(".lora_a.weight"):
            found[a.replace(".lora_a.weight", ".weight")] = a, a.replace(".lora_a.", ".lora_b.")
        elif a.endswith(".a"):  # layers.3.moe.experts.lora.w1.a
            found[a.replace(".lora.", ".").removesuffix(".a")] = a, f"{a[:-1]}b"
    assert 2 * len(found) == len(adapters)
    return found


def dense(base: Parameters, adapters: Parameters, scale: float) -> Parameters:
    """The base's weights with all adapters added; one expert at a time."""
    weights = dict(base)
    for name, (a, b) in pairs(adapters).items():
        if adapters[a].dim() == 2:
            weights[name] = base[name] + scale * adapters[b] @ adapters[a]
        else:
            deltas = [scale * adapters[b][e] @ adapters[a][e] for e in range(len(base[name]))]
            weights[name] = base[name] + torch.stack(deltas)
    return weights


def train(
    family: str, config: Any, base: Parameters, initial: Parameters, scale: float, ids: np.ndarray, s: Settings
) -> dict[str, Any]:
    """Train in float64. "steps": loss, auxiliary loss, gradient norm; "gradients": of the first step; "weights"."""
    adapters = {name: value.clone() for name, value in initial.items()}
    optimizer = torch.optim.AdamW(
        adapters.values(), lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=s.weight_decay, foreach=False
    )
    steps, first = [], {}
    for step in range(1, s.steps + 1):
        weights = {name: value.requires_grad_() for name, value in dense(base, adapters, scale).items()}
        batch = sequences(ids, config.seq_len, s, step)
        outputs = [FAMILIES[family](row[:-1], weights, config) for row in batch]
        logits, aux = torch.cat([o[0] for o in outputs]), torch.stack([o[1] for o in outputs]).mean()
        loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        wanted = pairs(adapters)
        gradients = torch.autograd.grad(loss + aux, [weights[name] for name in wanted])
        for (a, b), gradient in zip(wanted.values(), gradients, strict=True):
            adapters[a].grad = scale * adapters[b].transpose(-1, -2) @ gradient
            adapters[b].grad = scale * gradient @ adapters[a].transpose(-1, -2)
        first = first or {name: value.grad.clone() for name, value in adapters.items() if value.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(adapters.values(), s.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(step, s)
        optimizer.step()
        steps.append([loss.item(), aux.item(), norm.item()])
        weights.clear()
        base = {name: value.detach() for name, value in base.items()}
    return {"steps": steps, "gradients": first, "weights": adapters}
