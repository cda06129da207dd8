"""What a layer may know beside its input: which sequences these are, and what was computed for them before."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from .dropout import token_keys


class KVCache:
    """What was computed of the tokens already seen; `length` is their number.

    Attention keeps keys and values. A recurrent layer keeps its state, of one size for any length, in `states`.
    Both stand under the global name of the module, so they can be saved, and taken up by another cache.
    """

    def __init__(self) -> None:
        self.length = 0
        self.states: dict[str, Tensor] = {}

    def extend(self, name: str, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Append a module's new keys and values [B, H, T, hd] and return all of them.

        window: how many tokens, itself included, a token looks back; what is out of sight of the next one is dropped.
        """
        places = f"{name}.k", f"{name}.v"
        if places[0] in self.states:
            k, v = (torch.cat([self.states[place], new], dim=2) for place, new in zip(places, (k, v), strict=True))
        first = 0 if window is None else max(0, k.shape[2] - window + 1)
        for place, whole in zip(places, (k, v), strict=True):
            self.states[place] = whole[:, :, first:]
        return k, v


@dataclass
class MoEStats:
    """What one MoE layer did with (part of) one micro-batch."""

    load: Tensor  # [E] assignments of valid tokens
    dropped: Tensor  # [E] how many of them the expert did not take
    entropy: Tensor  # [] of the router's probabilities, in nats, summed over valid tokens
    aux: Tensor  # [] this part's share of the auxiliary loss


@dataclass
class Context:
    """The sequence is the unit: nothing here depends on how sequences are grouped or spread over ranks.

    lengths: [B] valid tokens of each sequence (the rest is padding on the right); None: all of them.
    keys: [B] int64, one random number per sequence, from which all its dropout and noise follow; None: neither.
    aux_weights: [B] what each sequence's auxiliary loss weighs in the objective; None: not trained.
    loss_weight: what one token's loss weighs in the objective.
    cache: what was computed of earlier tokens, when decoding.
    stats: filled by MoE layers, by (layer, part). Assigned, not added to, so recomputing a layer changes nothing.
    part: which of the parts of a micro-batch this is, where a micro-batch is split once more.
    """

    lengths: Tensor | None = None
    keys: Tensor | None = None
    aux_weights: Tensor | None = None
    loss_weight: float = 1.0
    cache: KVCache | None = None
    stats: dict[tuple[int, int], MoEStats] = field(default_factory=dict)
    part: int = 0

    @classmethod
    def of(cls, tokens: Tensor, training: bool) -> Self:
        """The context of a plain call with tokens [B, T]: when training, dropout follows from torch's generator."""
        return cls(keys=torch.randint(2**62, (len(tokens),), device=tokens.device) if training else None)

    def split(self, sizes: list[int]) -> list[Self]:
        """The same context for consecutive groups of sequences, `sizes[i]` of them in part i; stats stay shared."""

        def pieces(x: Tensor | None) -> list[Tensor | None]:
            return [None] * len(sizes) if x is None else list(x.split(sizes))

        columns = zip(pieces(self.lengths), pieces(self.keys), pieces(self.aux_weights), strict=True)
        return [
            replace(self, lengths=lengths, keys=keys, aux_weights=weights, part=part)
            for part, (lengths, keys, weights) in enumerate(columns)
        ]

    def to(self, device: torch.device) -> Self:
        """The same context with its tensors on a device."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return replace(self, lengths=move(self.lengths), keys=move(self.keys), aux_weights=move(self.aux_weights))

    def token_keys(self, x: Tensor) -> Tensor | None:
        """[B, T] int32, one random number per token of x [B, T, …], which start their sequences; None: no dropout."""
        return None if self.keys is None else token_keys(self.keys, 0, x.shape[1])

    def valid(self, x: Tensor) -> Tensor:
        """[B, T] bool: which tokens of x [B, T, …] are not padding."""
        batch, length = x.shape[:2]
        if self.lengths is None:
            return torch.ones(batch, length, dtype=torch.bool, device=x.device)
        return torch.arange(length, device=x.device) < self.lengths[:, None]
