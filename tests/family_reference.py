"""Reference implementations of mooshak (norm_order "post"), blues and microrwkv for one sequence, as loops.

Each model is a function (tokens [T], parameters by global name, config) → (logits [T, vocab], auxiliary loss []).
Shapes: T tokens, d model width, hd head width, K channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fira.models.blues import BluesConfig
from fira.models.microrwkv import MicroRWKVConfig
from fira.models.mooshak import MooshakConfig
from tests.reference import gelu

Parameters = dict[str, Tensor]


def below(p: Parameters, prefix: str) -> Parameters:
    """Parameters of a submodule, by their names in it."""
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x [T, hd]: pairs of channels are complex numbers, times exp(i · position · frequency)."""
    half = x.shape[1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * frequency
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=1)


def attention(
    x: Tensor, p: Parameters, heads: int, kv_heads: int, theta: float | None = None, window: int | None = None
) -> Tensor:
    """Causal self-attention x [T, d] → [T, d]. Head h uses the keys and values of head h · kv_heads // heads."""
    q, k, v = (x @ p[f"{n}.weight"].T for n in "qkv")
    width = q.shape[1] // heads
    columns = []
    for h in range(heads):
        shared = h * kv_heads // heads
        qh = q[:, h * width : (h + 1) * width]
        kh, vh = (m[:, shared * width : (shared + 1) * width] for m in (k, v))
        if theta is not None:
            qh, kh = rotate(qh, theta), rotate(kh, theta)
        rows = []
        for t in range(len(x)):
            first = 0 if window is None else max(0, t - window + 1)
            probabilities = (kh[first : t + 1] @ qh[t] / width**0.5).softmax(0)
            rows.append(probabilities @ vh[first : t + 1])
        columns.append(torch.stack(rows))
    y = torch.cat(columns, dim=1)
    if "g.weight" in p:
        y = y * (x @ p["g.weight"].T)
    return y @ p["o.weight"].T


def routing(x: Tensor, p: Parameters, top_k: int) -> list[list[tuple[int, Tensor]]]:
    """Experts of each token with their weights, the softmax over all experts without renormalisation."""
    logits = x @ p["router.gate.weight"].T + p.get("router.gate.bias", 0.0)
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    ranked = [sorted(range(logits.shape[1]), key=lambda e: -row[e].item())[:top_k] for row in logits]
    return [[(e, probabilities[t, e]) for e in chosen] for t, chosen in enumerate(ranked)]


def balance(x: Tensor, p: Parameters, chosen: list[list[tuple[int, Tensor]]]) -> Tensor:
    """Load-balance loss E Σ_e f_e P_e."""
    probabilities = (x @ p["router.gate.weight"].T + p.get("router.gate.bias", 0.0)).softmax(1)
    experts = probabilities.shape[1]
    share = [sum(e == other for row in chosen for other, _ in row) / len(x) for e in range(experts)]
    return experts * sum(f * probabilities[:, e].mean() for e, f in enumerate(share))


def mooshak_post(tokens: Tensor, p: Parameters, c: MooshakConfig) -> tuple[Tensor, Tensor]:
    x = p["layers.0.token.weight"][tokens]
    for layer in range(1, c.num_layers + 1):
        block = below(p, f"layers.{layer}.")
        h = x + attention(x, below(block, "attention."), c.n_head, c.n_kv_head or c.n_head, c.rope_theta)
        r = rms(h, block["norm1.weight"], c.norm_eps)
        inner = F.silu(r @ block["mlp.w1.weight"].T) * (r @ block["mlp.w3.weight"].T)
        x = rms(h + inner @ block["mlp.w2.weight"].T, block["norm2.weight"], c.norm_eps)
    head = below(p, f"layers.{c.num_layers + 1}.")
    return rms(x, head["norm.weight"], c.norm_eps) @ head["project.weight"].T, x.new_zeros(())


def blues(tokens: Tensor, p: Parameters, c: BluesConfig) -> tuple[Tensor, Tensor]:
    """blues without dropout and noise."""
    table = p["layers.0.token.weight"]
    x = table[tokens] * c.d_model**0.5
    aux = x.new_zeros(())
    for layer in range(1, c.num_layers + 1):
        block = below(p, f"layers.{layer}.")
        h = rms(x, block["norm1.weight"], c.norm_eps)
        h = attention(h, below(block, "attention."), c.n_head, c.n_kv_head, c.rope_theta)
        x = x + rms(h, block["norm2.weight"], c.norm_eps)
        h, moe = rms(x, block["norm3.weight"], c.norm_eps), below(block, "moe.")
        chosen = routing(h, moe, int(c.top_k))
        rows = []
        for token, experts in zip(h, chosen, strict=True):
            outputs = []
            for e, weight in experts:
                g, a = (moe["experts.w1"][e] @ token).chunk(2)
                out = moe["experts.w2"][e] @ (gelu(g) * a)
                outputs.append(weight * (out if c.gate_before_norm else rms(out, moe["norm.weight"], c.norm_eps)))
            rows.append(sum(outputs))
        y = torch.stack(rows)
        x = x + (rms(y, block["norm4.weight"], c.norm_eps) if c.gate_before_norm else y)
        aux = aux + c.aux_coefficient * balance(h, moe, chosen)
    head = below(p, f"layers.{c.num_layers + 1}.")
    return rms(x, head["norm.weight"], c.norm_eps) @ table.T, aux


def difference(x: Tensor) -> Tensor:
    """x_{t−1} − x_t of x [T, d]; the token before the first one is zero."""
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]]) - x


def recurrence(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Recurrence of one head: r, k, v [T, K]; w, u scalars; state [K, K] → y [T, K], state after the last token."""
    rows = []
    for t in range(len(r)):
        kv = torch.outer(k[t], v[t])
        rows.append(r[t] @ (state + u * kv))
        state = w * state + kv
    return torch.stack(rows), state


def time_mix(x: Tensor, p: Parameters, heads: int) -> Tensor:
    xx = difference(x)
    r, k, v, g = ((x + xx * p[f"maa_{n}"]) @ p[f"{n}.weight"].T for n in "rkvg")
    width = x.shape[1] // heads
    columns = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        w = torch.exp(-torch.exp(p["decay"][h]))
        y, _ = recurrence(r[:, part], k[:, part], v[:, part], w, p["bonus"][h], x.new_zeros(width, width))
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 64e-5).sqrt()
        columns.append(y * p["norm.weight"][part] + p["norm.bias"][part])
    return (torch.cat(columns, 1) * F.silu(g)) @ p["o.weight"].T


def channel_mix(x: Tensor, p: Parameters) -> Tensor:
    xx = difference(x)
    k = ((x + xx * p["maa_k"]) @ p["k.weight"].T).clamp(min=0) ** 2
    return torch.sigmoid((x + xx * p["maa_r"]) @ p["r.weight"].T) * (k @ p["v.weight"].T)


def microrwkv(tokens: Tensor, p: Parameters, c: MicroRWKVConfig) -> tuple[Tensor, Tensor]:
    table = p["layers.0.token.weight"]
    x = table[tokens] + p["layers.0.position.weight"][: len(tokens)]
    aux = x.new_zeros(())

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().sum(1, keepdim=True).sqrt() / c.d_model**0.5 + 1e-8)

    for layer in range(1, c.num_layers + 1):
        block = below(p, f"layers.{layer}.")
        x = x + time_mix(unit(x), below(block, "time_mix."), c.n_head)
        x = x + channel_mix(unit(x), below(block, "channel_mix."))
        x = x + attention(x, below(block, "sliding."), c.n_head, c.n_head, window=c.window)
        heads = c.n_group * c.n_head
        x = x + attention(time_mix(x, below(block, "time_mix."), c.n_head), below(block, "grouped."), heads, heads)
        moe = below(block, "experts.moe.")
        chosen = routing(x, moe, int(c.top_k))
        y, means = [], [x.new_zeros(c.d_moe) for _ in range(c.num_experts)]
        for token, experts in zip(x, chosen, strict=True):
            out = {e: moe["experts.w1"][e] @ token + moe["experts.b1"][e] for e, _ in experts}
            y.append(sum(weight * out[e] for e, weight in experts))
            for e, value in out.items():
                means[e] = means[e] + value / len(tokens)
        aux = aux + c.output_coefficient * torch.stack(means).square().mean()
        aux = aux + c.aux_coefficient * balance(x, moe, chosen)
        x = x + torch.stack(y) @ block["experts.project.weight"].T + block["experts.project.bias"]
    norm = p[f"layers.{c.num_layers + 1}.norm.weight"]
    return F.layer_norm(x, x.shape[1:], norm) @ table.T, aux
