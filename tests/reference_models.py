"""The five families written out from their formulas, without fira.nn: one sequence at a time, one expert at a time.

Shapes: T tokens, d model width, H heads, hd head width, E experts, k experts per token, V vocabulary.

    tokens [T] int64, parameters by global name, the family's config  →  logits [T, V], auxiliary loss []

Dropout and routing noise are not modelled.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = dict[str, Tensor]
Choices = tuple[Tensor, Tensor, Tensor]  # logits [T, E], weights [T, E] (zero where not chosen), chosen [T, E] bool


def below(p: Parameters, prefix: str) -> Parameters:
    """The parameters whose name starts with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def linear(x: Tensor, p: Parameters, name: str) -> Tensor:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def relu_squared(x: Tensor) -> Tensor:
    return x.where(x > 0, 0.0) ** 2


def add(x: Tensor, y: Tensor, p: Parameters, number: int) -> Tensor:
    """A residual connection, with its scalar if there is one."""
    return p.get(f"residual{number}.scale", 1.0) * x + y


def capped(logits: Tensor, c: Any) -> Tensor:
    return c.softcap * torch.tanh(logits / c.softcap) if c.softcap else logits


def rotate(x: Tensor, theta: float) -> Tensor:
    """[T, hd]: rotate the pair (x_i, x_{i + hd/2}) at position t by t · theta^(−2i/hd)."""
    half = x.shape[1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=x.dtype) * 2 / x.shape[1])
    angles = torch.arange(len(x), dtype=x.dtype)[:, None] * frequencies
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=1)


def attention(
    x: Tensor,
    p: Parameters,
    heads: int,
    kv_heads: int,
    theta: float | None = None,
    window: int | None = None,
    eps: float = 1e-5,
    tokens: Tensor | None = None,
) -> Tensor:
    """[T, d] → [T, d]: token t attends to tokens (t − window, t]; query head h uses key head h · kv_heads // heads.

    eps: of the norm of queries and keys, if the parameters have one; each group of channels of its width is normalised.
    """

    def normalised(y: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([rms_norm(part, weight, eps) for part in y.split(len(weight), 1)], 1)

    q, k, v = (linear(x, p, name) for name in "qkv")
    if "q_norm.weight" in p:
        q, k = normalised(q, p["q_norm.weight"]), normalised(k, p["k_norm.weight"])
    if "value_embedding.scale" in p:
        v = v + p["value_embedding.scale"] * p["value_embedding.table.weight"][tokens]
    width = q.shape[1] // heads
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))[None]
    hidden = (distance < 0) | (distance >= (window or len(x)))
    outputs = []
    for h in range(heads):
        shared = h * kv_heads // heads
        qh = q[:, h * width : (h + 1) * width]
        kh, vh = (y[:, shared * width : (shared + 1) * width] for y in (k, v))
        if theta is not None:
            qh, kh = rotate(qh, theta), rotate(kh, theta)
        scores = (qh @ kh.T / math.sqrt(width)).exp().masked_fill(hidden, 0.0)
        outputs.append(scores / scores.sum(1, keepdim=True) @ vh)
    y = torch.cat(outputs, dim=1)
    return linear(y * linear(x, p, "g") if "g.weight" in p else y, p, "o")


def route(x: Tensor, p: Parameters, k: int, temperature: float = 1.0, renormalise: bool = False) -> Choices:
    """[T, d] → choices: the k largest logits of each token, weighted by a softmax over all or over the kept ones."""
    logits = linear(x, p, "router.gate") / temperature
    threshold = logits.detach().sort(dim=1, descending=True).values[:, k - 1 : k]
    chosen = logits >= threshold
    kept = logits.exp() * chosen
    return logits, kept / (kept if renormalise else logits.exp()).sum(1, keepdim=True), chosen


def even_weights(choices: Choices) -> Tensor:
    """Σ_e (mean_t p_e − 1/E)²."""
    _, weights, _ = choices
    return (weights.mean(0) - 1 / weights.shape[1]).pow(2).sum()


def load_balance(choices: Choices) -> Tensor:
    """E Σ_e f_e P_e: f_e is the number of assignments per token, P_e the mean probability."""
    logits, _, chosen = choices
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    return logits.shape[1] * (chosen.to(logits.dtype).mean(0) * probabilities.mean(0)).sum()


def router_z(choices: Choices) -> Tensor:
    """mean_t (log Σ_e exp logit_e)²."""
    return choices[0].exp().sum(1).log().pow(2).mean()


def mix(choices: Choices, expert: Callable[[int], Tensor]) -> Tensor:
    """Σ_e p_e · expert(e): every expert computes all tokens, and its weight is zero where it was not chosen."""
    _, weights, _ = choices
    return sum(weights[:, e, None] * expert(e) for e in range(weights.shape[1]))


def gated(x: Tensor, p: Parameters, e: int, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """W2 (activation(g) ⊙ a) with (g, a) = W1 x, without biases."""
    g, a = (x @ p["experts.w1"][e].T).chunk(2, dim=1)
    return (activation(g) * a) @ p["experts.w2"][e].T


def fira_experts(
    x: Tensor, p: Parameters, k: int, activation: Callable[[Tensor], Tensor] = gelu
) -> tuple[Tensor, Choices]:
    """[T, d] → [T, d] and the choices."""
    choices = route(x, p, k, temperature=0.9, renormalise=True)

    def expert(e: int) -> Tensor:
        hidden = activation(x @ p["experts.w1"][e].T + p["experts.b1"][e])
        return hidden @ p["experts.w2"][e].T + p["experts.b2"][e]

    return mix(choices, expert), choices


def fira(tokens: Tensor, p: Parameters, c: Any, length: int | None = None) -> tuple[Tensor, Tensor]:
    """length: number of tokens before the padding; the auxiliary loss is computed from these."""
    x = p["layers.0.token.weight"][tokens] + p["layers.0.position.weight"][: len(tokens)]
    aux = x.new_zeros(())
    for layer in range(1, c.num_layers + 1):
        q = below(p, f"layers.{layer}.")
        h = layer_norm(x, q["norm1.weight"], q["norm1.bias"])
        x = add(x, attention(h, below(q, "attention."), c.n_head, c.n_head, tokens=tokens), q, 1)
        h = layer_norm(x, q["norm2.weight"], q["norm2.bias"])
        y, choices = fira_experts(h, below(q, "moe."), c.top_k, relu_squared if c.relu_squared else gelu)
        x = add(x, layer_norm(y, q["post_norm.weight"], q["post_norm.bias"]), q, 2)
        logits, weights, chosen = (part[:length] for part in choices)
        choices = logits, weights, chosen
        aux = aux + c.aux_coefficient * even_weights(choices)
        aux = aux + c.switch_coefficient * load_balance(choices) + c.z_coefficient * router_z(choices)
    head = below(p, f"layers.{c.num_layers + 1}.")
    return capped(layer_norm(x, head["norm.weight"], head["norm.bias"]) @ head["project.weight"].T, c), aux


def rish(tokens: Tensor, p: Parameters, c: Any) -> tuple[Tensor, Tensor]:
    x = p["layers.0.token.weight"][tokens]
    aux, width = x.new_zeros(()), c.d_model // c.n_head
    growth = max(1.0, c.rope_factor * len(tokens) / c.max_position - (c.rope_factor - 1))
    theta = c.rope_theta * growth ** (width / (width - 2))
    activation = relu_squared if c.relu_squared else silu
    for layer in range(1, c.num_layers + 1):
        q = below(p, f"layers.{layer}.")
        pre = c.norm_order == "pre"
        h = rms_norm(x, q["norm1.weight"], c.norm_eps) if pre else x
        y = attention(h, below(q, "attention."), c.n_head, c.n_kv_head, theta, eps=c.norm_eps, tokens=tokens)
        x = add(x, y if pre else rms_norm(y, q["norm1.weight"], c.norm_eps), q, 1)
        moe = below(q, "moe.")
        h = rms_norm(x, q["norm2.weight"], c.norm_eps) if pre else x
        choices = route(h, moe, c.top_k)
        y = mix(choices, lambda e, h=h, moe=moe: gated(h, moe, e, activation))
        x = add(x, y if pre else rms_norm(y, q["norm2.weight"], c.norm_eps), q, 2)
        aux = aux + c.aux_coefficient / c.num_layers * load_balance(choices)
    head = below(p, f"layers.{c.num_layers + 1}.")
    return capped(rms_norm(x, head["norm.weight"], c.norm_eps) @ head["project.weight"].T, c), aux


def mooshak(tokens: Tensor, p: Parameters, c: Any) -> tuple[Tensor, Tensor]:
    x = p["layers.0.token.weight"][tokens]
    heads = c.n_head, c.n_kv_head or c.n_head
    activation = relu_squared if c.relu_squared else silu

    def mlp(h: Tensor, q: Parameters) -> Tensor:
        return linear(activation(linear(h, q, "mlp.w1")) * linear(h, q, "mlp.w3"), q, "mlp.w2")

    for layer in range(1, c.num_layers + 1):
        q = below(p, f"layers.{layer}.")
        if c.norm_order == "pre":
            h = rms_norm(x, q["norm1.weight"], c.norm_eps)
            h = attention(h, below(q, "attention."), *heads, c.rope_theta, eps=c.norm_eps, tokens=tokens)
            x = add(x, h, q, 1)
            x = add(x, mlp(rms_norm(x, q["norm2.weight"], c.norm_eps), q), q, 2)
        else:
            h = attention(x, below(q, "attention."), *heads, c.rope_theta, eps=c.norm_eps, tokens=tokens)
            h = add(x, h, q, 1)
            h = add(h, mlp(rms_norm(h, q["norm1.weight"], c.norm_eps), q), q, 2)
            x = rms_norm(h, q["norm2.weight"], c.norm_eps)
    head = below(p, f"layers.{c.num_layers + 1}.")
    return capped(rms_norm(x, head["norm.weight"], c.norm_eps) @ head["project.weight"].T, c), x.new_zeros(())


def blues(tokens: Tensor, p: Parameters, c: Any) -> tuple[Tensor, Tensor]:
    table = p["layers.0.token.weight"]
    x = table[tokens] * math.sqrt(c.d_model)
    aux = x.new_zeros(())
    for layer in range(1, c.num_layers + 1):
        q = below(p, f"layers.{layer}.")
        h = rms_norm(x, q["norm1.weight"], c.norm_eps)
        h = attention(h, below(q, "attention."), c.n_head, c.n_kv_head, c.rope_theta, eps=c.norm_eps, tokens=tokens)
        x = add(x, rms_norm(h, q["norm2.weight"], c.norm_eps), q, 1)
        h, moe = rms_norm(x, q["norm3.weight"], c.norm_eps), below(q, "moe.")
        choices = route(h, moe, c.top_k)

        def expert(e: int, h: Tensor = h, m: Parameters = moe) -> Tensor:
            y = gated(h, m, e, relu_squared if c.relu_squared else gelu)
            return y if c.gate_before_norm else rms_norm(y, m["norm.weight"], c.norm_eps)

        y = mix(choices, expert)
        x = add(x, rms_norm(y, q["norm4.weight"], c.norm_eps) if c.gate_before_norm else y, q, 2)
        aux = aux + c.aux_coefficient * load_balance(choices)
    head = below(p, f"layers.{c.num_layers + 1}.")
    return capped(rms_norm(x, head["norm.weight"], c.norm_eps) @ table.T, c), aux


def shift(x: Tensor) -> Tensor:
    """x_{t−1} − x_t, with zeros before the first token."""
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]]) - x


def recurrence(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = r_tᵀ (S_t + u · k_t v_tᵀ), S_{t+1} = w · S_t + k_t v_tᵀ, one token after another.

    r, k, v [H, T, K], w, u [H], state [H, K, K] → y [H, T, K] and the state after the last token.
    """
    w, u, rows = w[:, None, None], u[:, None, None], []
    for t in range(r.shape[1]):
        kv = k[:, t, :, None] * v[:, t, None, :]
        rows.append((r[:, t, :, None] * (state + u * kv)).sum(1))
        state = w * state + kv
    return torch.stack(rows, 1), state


def time_mix(x: Tensor, p: Parameters, heads: int) -> Tensor:
    r, k, v, g = (linear(x + shift(x) * p[f"maa_{name}"], p, name) for name in "rkvg")
    r, k, v = (y.view(len(x), heads, -1).transpose(0, 1) for y in (r, k, v))
    state = x.new_zeros(heads, r.shape[2], r.shape[2])
    y, _ = recurrence(r, k, v, torch.exp(-torch.exp(p["decay"])), p["bonus"], state)
    y = layer_norm(y.transpose(0, 1), x.new_ones(()), eps=64e-5).flatten(1) * p["norm.weight"] + p["norm.bias"]
    return linear(y * silu(g), p, "o")


def channel_mix(x: Tensor, p: Parameters) -> Tensor:
    k = relu_squared(linear(x + shift(x) * p["maa_k"], p, "k"))
    return torch.sigmoid(linear(x + shift(x) * p["maa_r"], p, "r")) * linear(k, p, "v")


def microrwkv(tokens: Tensor, p: Parameters, c: Any) -> tuple[Tensor, Tensor]:
    table = p["layers.0.token.weight"]
    x = table[tokens] + p["layers.0.position.weight"][: len(tokens)]
    aux, heads = x.new_zeros(()), c.n_group * c.n_head

    def unit(x: Tensor) -> Tensor:
        return x / (x.pow(2).sum(1, keepdim=True).sqrt() / math.sqrt(c.d_model) + 1e-8)

    for layer in range(1, c.num_layers + 1):
        q = below(p, f"layers.{layer}.")
        x = x + time_mix(unit(x), below(q, "time_mix."), c.n_head)
        x = x + channel_mix(unit(x), below(q, "channel_mix."))
        x = x + attention(x, below(q, "sliding."), c.n_head, c.n_head, window=c.window)
        x = x + attention(time_mix(x, below(q, "time_mix."), c.n_head), below(q, "grouped."), heads, heads)
        moe = below(q, "experts.moe.")
        choices = route(x, moe, c.top_k)
        out = [x @ moe["experts.w1"][e].T + moe["experts.b1"][e] for e in range(c.num_experts)]
        means = torch.stack([(out[e] * choices[2][:, e, None]).mean(0) for e in range(c.num_experts)])
        aux = aux + c.output_coefficient * means.pow(2).mean() + c.aux_coefficient * load_balance(choices)
        x = x + linear(mix(choices, out.__getitem__), q, "experts.project")
    norm = p[f"layers.{c.num_layers + 1}.norm.weight"]
    return capped(F.linear(layer_norm(x, norm), table), c), aux


FAMILIES = {"fira": fira, "rish": rish, "mooshak": mooshak, "blues": blues, "microrwkv": microrwkv}
