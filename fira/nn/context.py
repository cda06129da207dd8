"""What a layer may know beside its input: which sequences these are, and what was computed for them before."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from fira.nn.dropout import token_keys
from fira.nn.kv_cache import KVCache


@dataclass
class MoEStats:
    """What one MoE layer did with (part of) one micro-batch."""

    load: Tensor  # [E] assignments of valid tokens
    dropped: Tensor  # [E] how many of them the expert did not take
    entropy: Tensor  # [] of the router's probabilities, in nats, summed over valid tokens
    aux: Tensor  # [] this part's share of the auxiliary loss; with its graph where the caller adds it (aux_apart)


@dataclass
class Context:
    """The sequence is the unit: nothing here depends on how sequences are grouped or spread over ranks.

    lengths: [B] where each sequence ends (the rest is padding on the right); None: all are as long as the batch.
    starts: [B] where each sequence starts (what is before is padding on the left, as in batched decoding); None: at 0.
    targets: [B, T] the token after each, −100 where nothing is to be learnt; None: not known. With them the model gives
    not logits but their summed loss, [1].
    keys: [B] int64, one random number per sequence, from which all its dropout and noise follow; None: neither.
    aux_weights: [B] what each sequence's auxiliary loss weighs in the objective; None: not trained.
    aux_apart: the caller adds the auxiliary losses in `stats` to its objective. Otherwise layers train them.
    loss_weight: what one token's loss weighs in the objective.
    cache: what was computed of earlier tokens, when decoding.
    last: of how many of the last tokens logits are wanted; None: of all.
    stats: filled by MoE layers, by (layer, part). Assigned, not added to, so recomputing a layer changes nothing.
    attentions: filled by attention with its probabilities [B, H, new, seen] by name; None: they are not wanted.
    part: which of the parts of a micro-batch this is, where a micro-batch is split once more.
    """

    lengths: Tensor | None = None
    starts: Tensor | None = None
    targets: Tensor | None = None
    keys: Tensor | None = None
    aux_weights: Tensor | None = None
    aux_apart: bool = False
    loss_weight: float = 1.0
    cache: KVCache | None = None
    last: int | None = None
    stats: dict[tuple[int, int], MoEStats] = field(default_factory=dict)
    attentions: dict[str, Tensor] | None = None
    part: int = 0

    @classmethod
    def of(cls, tokens: Tensor, training: bool) -> Self:
        """The context of a plain call with tokens [B, T]: when training, dropout follows from torch's generator."""
        return cls(keys=torch.randint(2**62, (len(tokens),), device=tokens.device) if training else None)

    def split(self, sizes: list[int]) -> list[Self]:
        """The same context for consecutive groups of sequences, `sizes[i]` of them in part i; stats stay shared."""

        def pieces(x: Tensor | None) -> list[Tensor | None]:
            return [None] * len(sizes) if x is None else list(x.split(sizes))

        columns = zip(*(pieces(x) for x in self._rows().values()), strict=True)
        parts: list[dict[str, Any]] = [dict(zip(self._rows(), rows, strict=True)) for rows in columns]
        return [replace(self, part=part, **rows) for part, rows in enumerate(parts)]

    def to(self, device: torch.device) -> Self:
        """The same context with its tensors on a device."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        moved: dict[str, Any] = {name: move(x) for name, x in self._rows().items()}
        return replace(self, **moved)

    def _rows(self) -> dict[str, Tensor | None]:
        """What there is one of per sequence."""
        return {name: getattr(self, name) for name in ("lengths", "starts", "targets", "keys", "aux_weights")}

    def token_keys(self, x: Tensor) -> Tensor | None:
        """[B, T] int32, one random number per token of x [B, T, …], which start their sequences; None: no dropout."""
        return None if self.keys is None else token_keys(self.keys, 0, x.shape[1])

    def places(self, x: Tensor) -> Tensor:
        """[1, T] or, where sequences start apart, [B, T] int64: how many of its sequence are before each token of x
        [B, T, …]; below zero for padding on the left."""
        first = self.cache.length if self.cache else 0
        at = torch.arange(first, first + x.shape[1], device=x.device)[None]
        return at if self.starts is None else at - self.starts[:, None]

    def valid(self, x: Tensor) -> Tensor:
        """[B, T] bool: which tokens of x [B, T, …] are not padding."""
        places = self.places(x)
        valid = (places >= 0).expand(x.shape[:2])
        if self.lengths is None:
            return valid
        return valid & (places < (self.lengths if self.starts is None else self.lengths - self.starts)[:, None])

    def without_padding(self, x: Tensor) -> Tensor:
        """x [B, T, d] with zeros for padding on the left, which a recurrent layer would otherwise carry along."""
        return x if self.starts is None else x * (self.places(x) >= 0)[..., None]
