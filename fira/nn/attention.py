"""Causal self-attention with the options of all model families."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fira.nn.context import Context
from fira.nn.norms import RMSNorm
from fira.nn.rotary import Rotary
from fira.nn.value_embedding import ValueEmbedding


class SelfAttention(nn.Module):
    """softmax(q kᵀ / √hd) v per head, each token attending to itself and earlier ones (Vaswani et al. 2017).

    name: the module's global name, the key of its keys and values in a cache.
    linear: constructor of the projections q, k, v, o, called as linear(in, out, bias=).
    n_kv_head: each key and value head serves n_head / n_kv_head query heads (Ainslie et al. 2023, arXiv 2305.13245).
    qk_norm_eps: RMS-normalise q and k, over their full width or with `qk_norm_per_head` over the width of a head.
    window: token t attends to (t − window, t].
    gated: the heads' output is multiplied by a linear function of x before the projection o.
    value_vocab: size of the vocabulary of a `ValueEmbedding`; None: there is none.
    """

    lora_target = "attention"

    def __init__(
        self,
        d_model: int,
        n_head: int,
        name: str,
        linear: Callable[..., nn.Linear],
        *,
        n_kv_head: int | None = None,
        bias: bool = False,
        qk_norm_eps: float | None = None,
        qk_norm_per_head: bool = False,
        rotary: Rotary | None = None,
        window: int | None = None,
        gated: bool = False,
        value_vocab: int | None = None,
    ) -> None:
        super().__init__()
        n_kv_head = n_kv_head or n_head
        if d_model % n_head:
            raise ValueError(f"d_model {d_model} is not divisible by n_head {n_head}")
        if n_head % n_kv_head:
            raise ValueError(f"n_head {n_head} is not divisible by n_kv_head {n_kv_head}")
        self.head_dim = d_model // n_head
        self.shared = n_kv_head != n_head
        self.name = name
        self.rotary = rotary
        self.window = window
        width = n_kv_head * self.head_dim
        self.q = linear(d_model, d_model, bias=bias)
        self.k, self.v = (linear(d_model, width, bias=bias) for _ in range(2))
        self.o = linear(d_model, d_model, bias=bias)
        self.g = linear(d_model, d_model, bias=bias) if gated else None
        self.q_norm, self.k_norm = (
            None if qk_norm_eps is None else RMSNorm(self.head_dim if qk_norm_per_head else w, qk_norm_eps)
            for w in (d_model, width)
        )
        self.value_embedding = None if value_vocab is None else ValueEmbedding(value_vocab, width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x: [B, T, d] → [B, T, d]. With a cache, x holds the tokens that follow the cached ones."""
        cache, documents, starts = context.decoding.cache, context.documents, context.starts
        length = x.shape[1] + (cache.length if cache is not None else 0)
        tokens, shape = x.flatten(0, 1), (*x.shape[:2], -1, self.head_dim)
        v = self.v(tokens)
        if self.value_embedding is not None:
            v = v + self.value_embedding(context).flatten(0, 1).to(v.dtype)
        q = self._heads(self.q(tokens), shape, self.q_norm)
        k = self._heads(self.k(tokens), shape, self.k_norm)
        v = self._heads(v, shape)
        if self.rotary is not None:
            if self.rotary.grows:
                (q,) = self.rotary(length, q, documents=documents, starts=starts)
            else:
                q, k = self.rotary(length, q, k, documents=documents, starts=starts)
        if cache is not None:
            k, v = cache.extend(self.name, k, v, self.window)
        if self.rotary is not None and self.rotary.grows:  # the angles of all keys depend on the length
            (k,) = self.rotary(length, k, documents=documents, starts=starts)
        mask = self._mask(q, k, length, context)
        if context.decoding.attentions is not None:
            y, context.decoding.attentions[self.name] = _attend(q, k, v, mask)
        else:
            causal = mask is None and q.shape[2] > 1
            shared = self.shared
            if shared and _lacks_flash_attention(q.device):
                (k, v), shared = _repeat_heads(q, k, v), False
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=shared)
        y = y.transpose(1, 2).reshape(tokens.shape)
        return self.o(y if self.g is None else y * self.g(tokens)).view(x.shape)

    def _heads(self, y: Tensor, shape: tuple[int, ...], norm: RMSNorm | None = None) -> Tensor:
        """y [B · T, H · hd] → [B, H, T, hd], normalised in groups of channels of the norm's width.

        shape: (B, T, −1, hd).
        """
        if norm is not None:
            y = norm(y.unflatten(-1, (-1, norm.width)))
        return y.view(shape).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, length: int, context: Context) -> Tensor | None:
        """Attention mask, [new, seen] or [B, 1, new, seen] bool: whether a query attends to a key.

        The last query and the last key are those of token `length` − 1. Return None if no mask is needed: one query
        that attends to all keys, or as many queries as keys with the plain causal mask.
        """
        new, seen = q.shape[2], k.shape[2]
        starts, documents = context.starts, context.documents
        window = self.window or seen
        if window >= seen and new in (1, seen) and starts is None and documents is None:
            return None
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device)
        mask = mask.tril(seen - new).triu(seen - new - window + 1)
        if documents is not None:
            return mask & (documents.numbers[:, None, :, None] == documents.numbers[:, None, None])
        if starts is None:
            return mask
        unpadded = torch.arange(length - seen, length, device=q.device) >= starts[:, None, None, None]
        return mask & unpadded | mask.triu(seen - new)  # padding attends to itself: a softmax over an empty set is NaN

    def own_flops_per_token(self, length: int) -> float:
        """FLOPs of scores and weighted values; the causal mask halves them, a window reduces them."""
        return 2.0 * self.o.in_features * min(length, 2 * (self.window or length))


def _lacks_flash_attention(device: torch.device) -> bool:
    """Whether a device is a GPU older than sm_80. With shared heads torch would store all of its scores."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def _repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with each head repeated for the query heads that it serves."""
    repeats = q.shape[1] // k.shape[1]
    return k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """scaled_dot_product_attention, and the probabilities [B, H, new, seen], which it does not return."""
    k, v = _repeat_heads(q, k, v)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=wide).to(v.dtype)
    return probabilities @ v, probabilities
