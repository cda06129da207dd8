"""Time mixing and channel mixing of RWKV-5 (Peng et al. 2024, arXiv 2404.05892), with one decay per head.

Shapes: B sequences of T tokens, H heads of K channels, n chunks of C tokens; r, k, v [B, H, T, K].
The state S of a head is a [K, K] matrix, w = exp(−exp(decay)), and k_t v_tᵀ is an outer product:

    y_t = r_tᵀ (S_t + u · k_t v_tᵀ)        S_{t+1} = w · S_t + k_t v_tᵀ
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from fira.nn.context import Context
from fira.nn.init import Normal
from fira.nn.mlp import relu_squared
from fira.nn.norms import full_precision

CHUNK = 64


def _decay(log_w: Tensor, distance: Tensor) -> Tensor:
    """w^distance per head, zero if the distance is negative: log_w [H], distance […] → [H, …].

    Exponents are never positive, so nothing overflows; if w underflows, the result is zero.
    """
    powers = (log_w.view(-1, *[1] * distance.dim()) * distance.clamp(min=0)).exp()
    return powers.masked_fill(distance < 0, 0.0)


class _SameDocument(NamedTuple):
    """Whether two tokens of the chunked recurrence are in the same document, where the state starts at zero.

    A chunk's sum contains only the document of its last token, because no other one continues in the next chunk.
    None: always.
    """

    within: Tensor | None = None  # [B, 1, n, C, C] two tokens of a chunk
    at_end: Tensor | None = None  # [B, 1, n, C, 1] a token, and the last one of its chunk
    at_start: Tensor | None = None  # [B, 1, n, C, 1] a token, and the last one of the chunk before
    among: Tensor | None = None  # [B, 1, n + 1, n] the token before chunk m = 0, …, n, and the last one of a chunk

    @classmethod
    def of(cls, numbers: Tensor, chunk: int) -> Self:
        """numbers: [B, T], the document of each token."""
        d = nn.functional.pad(numbers, (-numbers.shape[1] % chunk, 0), value=-2).unflatten(1, (-1, chunk))  # [B, n, C]
        last = d[:, :, -1]
        before = nn.functional.pad(last, (1, 0), value=-2)  # [B, n + 1]
        pairs = (
            d[:, :, :, None] == d[:, :, None],
            (d == last[:, :, None])[..., None],
            (d == before[:, :-1, None])[..., None],
            before[:, :, None] == last[:, None],
        )
        return cls(*(pair[:, None] for pair in pairs))


def _where(same: Tensor | None, x: Tensor) -> Tensor:
    """x with zeros where `same` is false."""
    return x if same is None else x * same


def recurrence(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    chunk: int = CHUNK,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """r, k, v: [B, H, T, K]; log_w, u: [H]; state: [B, H, K, V] before the first token, None for zero → y, new state.

    The tokens are split into chunks. Within a chunk, and between the chunks' sums of k vᵀ, the recurrence is a product
    with a triangular matrix of decays, which costs O(T · chunk + (T / chunk)²) instead of O(T²) and needs no loop.
    documents: [B, T] number of each token's document, at whose first token the state is zero; without `state`.
    """
    length = r.shape[2]
    chunk = min(chunk, length)
    missing = -length % chunk
    # Leading zeros do not change a state that starts at zero; the contribution of `state` is added at the end.
    pieces = [nn.functional.pad(x, (0, 0, missing, 0)).unflatten(2, (-1, chunk)) for x in (r, k, v)]
    r_, k_, v_ = pieces  # [B, H, n, C, K]
    same = _SameDocument() if documents is None else _SameDocument.of(documents, chunk)
    at = torch.arange(chunk, device=r.device)
    within = _decay(log_w, at[:, None] - at - 1) + u[:, None, None] * torch.eye(chunk, dtype=u.dtype, device=u.device)
    y = _where(same.within, r_ @ k_.transpose(-1, -2) * within[:, None]) @ v_

    kept = _where(same.at_end, k_ * _decay(log_w, chunk - 1 - at)[:, None, :, None])
    sums = kept.transpose(-1, -2) @ v_  # [B, H, n, K, V]
    n = torch.arange(sums.shape[2] + 1, device=r.device)
    among = _decay(log_w, chunk * (n[:, None] - n[:-1] - 1))
    states = torch.einsum("...hmn,...hnkv->...hmkv", _where(same.among, among), sums)
    y = y + _where(same.at_start, r_ * _decay(log_w, at)[:, None, :, None]) @ states[:, :, :-1]
    y, last = y.flatten(2, 3)[:, :, missing:], states[:, :, -1]
    if state is not None:
        y = y + (r * _decay(log_w, torch.arange(length, device=r.device))[..., None]) @ state
        last = last + _decay(log_w, torch.full((), length, device=r.device))[:, None, None] * state
    return y, last


def _previous(x: Tensor, context: Context, *names: str) -> Tensor:
    """x_{t−1} for each x_t of [B, T, d]; zero before the first token. names: of module and call, for a cache."""
    cache, before = context.decoding.cache, torch.zeros_like(x[:, :1])
    if cache is not None:
        name = ".".join((*names, "x"))
        before = cache.states.get(name, before)
        cache.states[name] = x[:, -1:]
    previous = torch.cat([before, x[:, :-1]], dim=1)
    return previous if context.documents is None else previous * (context.documents.positions > 0)[..., None]


def _shift(width: int, power: float) -> Tensor:
    """[width] 1 − a^power with a = i/d: the initial weight of the previous token in each channel."""
    return 1 - (torch.arange(width) / width) ** power


class TimeMix(nn.Module):
    """W_o (GroupNorm_H(y) ⊙ silu(g)); r, k, v, g: linear in mixtures of each token and the one before.

    layer, layers: index l and number L of blocks; the initial values depend on ρ = l/(L−1) and σ = 1 − l/L.
    name: the module's global name, the key of its states in a cache.
    """

    lora_target = "attention"  # in whose place it is

    def __init__(self, d_model: int, n_head: int, layer: int, layers: int, name: str) -> None:
        super().__init__()
        if d_model % n_head:
            raise ValueError(f"d_model {d_model} is not divisible by n_head {n_head}")
        self.rho = layer / max(1, layers - 1)
        self.sigma = 1 - layer / layers
        self.head_dim = d_model // n_head
        self.name = name
        self.maa_r, self.maa_k, self.maa_v, self.maa_g = (nn.Parameter(torch.empty(d_model)) for _ in range(4))
        self.decay, self.bonus = (nn.Parameter(torch.empty(n_head)) for _ in range(2))
        self.r, self.k, self.v, self.g, self.o = (Normal(d_model, d_model, bias=False) for _ in range(5))
        self.norm = nn.GroupNorm(n_head, d_model, eps=64e-5)

    def init_parameter(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Deterministic initial mixtures, decays and bonuses as functions of layer, head and channel."""
        width, heads = len(self.maa_r), len(self.decay)
        head = torch.arange(heads) / max(1, heads - 1)
        start = {
            "maa_r": _shift(width, self.sigma / 2),
            "maa_k": _shift(width, self.sigma),
            "maa_v": _shift(width, self.sigma) - 0.3 * self.rho,
            "maa_g": _shift(width, self.sigma / 2),
            "decay": -6 + 5 * head ** (0.7 + 1.3 * self.rho),
            "bonus": self.rho * (1 - head),
        }
        value.copy_(start[name])

    def forward(self, x: Tensor, context: Context, call: str) -> Tensor:
        """[B, T, d] → [B, T, d]. call: distinguishes the states of several calls per token in a cache."""
        change = _previous(x, context, self.name, call) - x
        mixed = (x + change * maa for maa in (self.maa_r, self.maa_k, self.maa_v, self.maa_g))
        r, k, v, g = (linear(m) for linear, m in zip((self.r, self.k, self.v, self.g), mixed, strict=True))
        y = self._recur(r, k, v, context, call)
        y = self.norm(y.flatten(0, 1)).view_as(x)
        return self.o(y * nn.functional.silu(g))

    def _recur(self, r: Tensor, k: Tensor, v: Tensor, context: Context, call: str) -> Tensor:
        """[B, T, d] each → [B, T, d], computed in at least fp32, because states accumulate over a whole sequence."""
        cache = context.decoding.cache
        documents = None if context.documents is None else context.documents.numbers
        wide = torch.promote_types(self.decay.dtype, torch.float32)
        with full_precision(r.device):
            r, k, v = (x.to(wide).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for x in (r, k, v))
            state = None if cache is None else cache.states.get(f"{self.name}.{call}.state")
            w, u = -self.decay.to(wide).exp(), self.bonus.to(wide)
            y, state = recurrence(r, k, v, w, u, state, documents=documents)
        if cache is not None:
            cache.states[f"{self.name}.{call}.state"] = state
        return y.to(self.decay.dtype).transpose(1, 2).flatten(2)

    def own_flops_per_token(self, length: int) -> float:
        """FLOPs of the products within a chunk, and of r, k and v with the states."""
        width = len(self.maa_r)
        return 4.0 * width * (min(CHUNK, length) + self.head_dim)


class ChannelMix(nn.Module):
    """sigmoid(W_r x_r) ⊙ W_v relu(W_k x_k)², with mixtures of tokens as in TimeMix."""

    lora_target = "attention"

    def __init__(self, d_model: int, width: int, layer: int, layers: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.sigma = 1 - layer / layers
        self.maa_k, self.maa_r = (nn.Parameter(torch.empty(d_model)) for _ in range(2))
        self.k = Normal(d_model, width, bias=False)
        self.v = Normal(width, d_model, bias=False)
        self.r = Normal(d_model, d_model, bias=False)

    def init_parameter(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Initial mixtures as TimeMix.maa_k."""
        value.copy_(_shift(len(value), self.sigma))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, T, d] → [B, T, d]. The last token is kept in a cache."""
        change = _previous(x, context, self.name) - x
        k = relu_squared(self.k(x + change * self.maa_k))
        return self.r(x + change * self.maa_r).sigmoid() * self.v(k)
