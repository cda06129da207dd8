"""Reference implementation of fira with loops over tokens, heads and experts.

Shapes: T tokens, d model width, E experts.
"""

import math

import torch
from torch import Tensor

from fira.models.fira import FiraConfig


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last dimension, with the biased variance."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attention(x: Tensor, p: dict[str, Tensor], n_head: int) -> Tensor:
    """Causal self-attention of one sequence x [T, d] → [T, d]."""
    q, k, v = (x @ p[f"{n}.weight"].T + p[f"{n}.bias"] for n in "qkv")
    width = x.shape[1] // n_head
    rows = []
    for t in range(len(x)):
        heads = []
        for h in range(n_head):
            part = slice(h * width, (h + 1) * width)
            scores = torch.stack([q[t, part] @ k[s, part] for s in range(t + 1)]) / math.sqrt(width)
            probabilities = scores.exp() / scores.exp().sum()
            heads.append(sum(probabilities[s] * v[s, part] for s in range(t + 1)))
        rows.append(torch.cat(heads) @ p["o.weight"].T + p["o.bias"])
    return torch.stack(rows)


def experts(x: Tensor, p: dict[str, Tensor], top_k: int, valid: int) -> tuple[Tensor, Tensor]:
    """x [T, d] → output [T, d], and Σ_e (mean p_e − 1/E)² with the mean over the first `valid` tokens."""
    num_experts = len(p["router.gate.bias"])
    mean = [x.new_zeros(()) for _ in range(num_experts)]
    rows = []
    for t, token in enumerate(x):
        g = (p["router.gate.weight"] @ token + p["router.gate.bias"]) / 0.9
        kept = sorted(range(num_experts), key=lambda e: -g[e].item())[:top_k]
        total = sum(g[e].exp() for e in kept)
        row = torch.zeros_like(token)
        for e in kept:
            hidden = gelu(p["experts.w1"][e] @ token + p["experts.b1"][e])
            weight = g[e].exp() / total
            row = row + weight * (p["experts.w2"][e] @ hidden + p["experts.b2"][e])
            if t < valid:
                mean[e] = mean[e] + weight / valid
        rows.append(row)
    return torch.stack(rows), sum((p_e - 1 / num_experts) ** 2 for p_e in mean)


def fira(tokens: Tensor, p: dict[str, Tensor], config: FiraConfig, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """tokens [B, T], parameters by global name, lengths [B] → logits [B, T, vocab] and auxiliary losses [B]."""
    logits, aux = [], []
    for sequence, length in zip(tokens, lengths, strict=True):
        x = torch.stack(
            [p["layers.0.token.weight"][s] + p["layers.0.position.weight"][t] for t, s in enumerate(sequence)]
        )
        balance = x.new_zeros(())
        for layer in range(1, config.num_layers + 1):
            block = _below(p, f"layers.{layer}.")
            x = x + attention(
                layer_norm(x, block["norm1.weight"], block["norm1.bias"]), _below(block, "attention."), config.n_head
            )
            h = layer_norm(x, block["norm2.weight"], block["norm2.bias"])
            y, loss = experts(h, _below(block, "moe."), int(config.top_k), length)
            x = x + layer_norm(y, block["post_norm.weight"], block["post_norm.bias"])
            balance = balance + config.aux_coefficient * loss
        head = _below(p, f"layers.{config.num_layers + 1}.")
        logits.append(layer_norm(x, head["norm.weight"], head["norm.bias"]) @ head["project.weight"].T)
        aux.append(balance)
    return torch.stack(logits), torch.stack(aux)


def _below(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Parameters of a submodule, by their names in it."""
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}
