"""The arguments of a layer besides its input: which sequences these are, and what training or decoding needs.

Shapes: B sequences of T tokens, E experts. The sequence is the unit, or the document where several are packed into a
sequence: nothing here depends on how sequences are grouped into micro-batches or distributed over ranks.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from fira.nn.documents import Documents
from fira.nn.dropout import token_keys, token_keys_at
from fira.nn.kv_cache import KVCache
from fira.nn.objective import CrossEntropy, Objective, Stored


def pinned_for(device: torch.device, x: Tensor) -> Tensor:
    """A tensor that can be copied to a device without waiting for it: on a CPU, pinned if the device is a GPU."""
    return x.pin_memory() if x.device.type == "cpu" and device.type == "cuda" else x


@dataclass
class MoEStats:
    """Routing statistics of one MoE layer for one micro-batch, or for one chunk of it."""

    load: Tensor  # [E] number of valid tokens assigned to each expert
    dropped: Tensor  # [E] how many of them exceeded the expert's capacity
    entropy: Tensor  # [] entropy of the router's probabilities in nats, summed over valid tokens
    aux: Tensor  # [] weighted auxiliary loss; has a graph only with `TrainingContext.caller_adds_aux`


@dataclass
class TrainingContext:
    """What the loss, the auxiliary losses and the routing statistics need.

    targets: [B, T] int64, the next token at each position, −100 where it is ignored. With targets the head returns the
    output of the objective, by default the summed loss [1], instead of logits.
    loss_weight: factor of one term of the objective, the inverse of their number in the global batch.
    aux_weights: factor of the auxiliary loss in the objective, [B] of each sequence, or [B, D] of each document; None:
    no auxiliary loss, no statistics.
    caller_adds_aux: the caller adds the auxiliary losses in `stats` to its objective. By default each MoE layer
    adds the gradient of its own.
    stats: filled by the MoE layers, by (layer, chunk). Entries are assigned, not accumulated, so recomputing a layer
    in the backward leaves them unchanged.
    stored: arguments of the objective.
    """

    targets: Tensor | None = None
    loss_weight: float = 1.0
    aux_weights: Tensor | None = None
    caller_adds_aux: bool = False
    stats: dict[tuple[int, int], MoEStats] = field(default_factory=dict)
    objective: Objective = field(default_factory=CrossEntropy)
    stored: Stored = field(default_factory=dict)


@dataclass
class DecodingContext:
    """What generation needs.

    cache: keys, values and states of earlier tokens; None: the input holds the whole sequences.
    logits_to_keep: number of last positions for which the head computes logits; None: all.
    attentions: filled by each attention layer, under its name, with its probabilities [B, H, new, seen]; None: they
    are not returned.
    """

    cache: KVCache | None = None
    logits_to_keep: int | None = None
    attentions: dict[str, Tensor] | None = None


class Context:
    """Describes the sequences of one call and holds what training and decoding need.

    lengths: [B] int64, where each sequence ends (the rest is padding on the right); None: all have the full length.
    starts: [B] int64, where each sequence starts (before it is padding on the left); None: at 0.
    documents: those that are packed into the sequences, at most D into one; without `starts` and without a cache. They
    contain the padding, so `lengths` is not read. None: each sequence is one document.
    keys: int64, one random number per sequence [B], or per document [B, D], that determines its dropout and routing
    noise; None: neither.
    chunk: index of these sequences among the chunks into which torchgpipe splits a micro-batch.
    tokens: [B, T] int64, the model's input, for layers that embed tokens again; None: the input are vectors.

    It is not a dataclass, because FSDP2 copies dataclasses among the arguments of a layer, and what the layer stores in
    the copy would be lost.
    """

    def __init__(
        self,
        *,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        documents: Documents | None = None,
        keys: Tensor | None = None,
        tokens: Tensor | None = None,
        training: TrainingContext | None = None,
        decoding: DecodingContext | None = None,
    ) -> None:
        self.lengths = lengths
        self.starts = starts
        self.documents = documents
        self.keys = keys
        self.tokens = tokens
        self.training = training or TrainingContext()
        self.decoding = decoding or DecodingContext()
        self.chunk = 0
        self._valid: Tensor | None = None  # last result of `valid`

    @classmethod
    def for_tokens(cls, tokens: Tensor, training: bool) -> Self:
        """Context of a plain call with tokens [B, T]; in training, dropout is seeded by torch's global generator."""
        return cls(keys=torch.randint(2**62, (len(tokens),), device=tokens.device) if training else None)

    def split(self, sizes: list[int]) -> list[Self]:
        """Contexts of consecutive chunks of `sizes[i]` sequences each. They share `stats`."""

        def rows(chunk: int) -> Callable[[Tensor], Tensor]:
            return lambda x: x.split(sizes)[chunk]

        chunks = [self._map(rows(chunk)) for chunk in range(len(sizes))]
        for number, chunk in enumerate(chunks):
            chunk.chunk = number
        return chunks

    def to(self, device: torch.device) -> Self:
        """The same context with its tensors on a device. From a CPU to a GPU they are copied asynchronously."""
        return self._map(lambda x: pinned_for(device, x).to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same context with a function applied to every tensor that has one row per sequence."""

        def apply(x: Tensor | None) -> Tensor | None:
            return None if x is None else change(x)

        new, t = copy(self), self.training
        new._valid = None
        new.lengths, new.starts, new.keys, new.tokens = map(apply, (self.lengths, self.starts, self.keys, self.tokens))
        new.documents = None if self.documents is None else Documents(*map(change, self.documents))
        new.training = replace(
            t,
            targets=apply(t.targets),
            aux_weights=apply(t.aux_weights),
            stored={name: change(tensor) for name, tensor in t.stored.items()},
        )
        return new

    def token_keys(self, x: Tensor) -> Tensor | None:
        """[B, T] int32, one random number per token of x [B, T, …], counted from position 0; None: no dropout."""
        if self.keys is None:
            return None
        if self.documents is None:
            return token_keys(self.keys, 0, x.shape[1])
        return token_keys_at(self.keys.gather(1, self.documents.indices), self.documents.positions)

    def positions(self, x: Tensor) -> Tensor:
        """[1, T] int64, or [B, T] with `starts` or `documents`: the position of each token of x [B, T, …].

        It is counted from the start of the sequence or of the document. Positions of padding on the left are negative.
        """
        if self.documents is not None:
            return self.documents.positions
        first = self.decoding.cache.length if self.decoding.cache else 0
        positions = torch.arange(first, first + x.shape[1], device=x.device)[None]
        return positions if self.starts is None else positions - self.starts[:, None]

    def valid(self, x: Tensor) -> Tensor:
        """[B, T] bool: which tokens of x [B, T, …] are not padding. All layers get the same tensor."""
        if self.decoding.cache is not None:
            return self._find_valid(x)
        if self._valid is None or self._valid.shape != x.shape[:2]:
            self._valid = self._find_valid(x)
        return self._valid

    def _find_valid(self, x: Tensor) -> Tensor:
        if self.documents is not None:
            return self.documents.numbers >= 0
        positions = self.positions(x)
        valid = (positions >= 0).expand(x.shape[:2])
        if self.lengths is None:
            return valid
        return valid & (positions < (self.lengths if self.starts is None else self.lengths - self.starts)[:, None])

    def zero_left_padding(self, x: Tensor) -> Tensor:
        """x [B, T, d] with zeros in the padding on the left, which a recurrent layer would otherwise carry forward."""
        return x if self.starts is None else x * (self.positions(x) >= 0)[..., None]
