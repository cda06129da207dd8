"""The keys, values and recurrent states of the tokens that a decoder has already processed."""

import torch
from torch import Tensor


class KVCache:
    """What was computed of the tokens already seen; `length` is their number.

    Attention keeps keys and values. A recurrent layer keeps its state, of one size for any length, in `states`.
    Both stand under the global name of the module, so they can be saved, and taken up by another cache.
    """

    def __init__(self) -> None:
        self.length = 0
        self.states: dict[str, Tensor] = {}
        self._room: dict[str, Tensor] = {}  # what keys and values are views of, with room for those that come

    def extend(self, name: str, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Append a module's new keys and values [B, H, T, hd] and return all of them.

        window: how many tokens, itself included, a token looks back; what is out of sight of the next one is dropped.
        """
        return self._append(f"{name}.k", k, window), self._append(f"{name}.v", v, window)

    def _append(self, place: str, new: Tensor, window: int | None) -> Tensor:
        """A state and the new, along dim 2: written behind it where room was left, so that nothing is copied."""
        old = self.states[place] if place in self.states else new[:, :, :0]
        before, end = old.shape[2], old.shape[2] + new.shape[2]
        if torch.is_grad_enabled() or window is not None:
            whole = torch.cat([old, new], dim=2)
            self.states[place] = whole if window is None else whole[:, :, max(0, end - window + 1) :]
            return whole
        room = self._room.get(place)
        if room is None or old.data_ptr() != room.data_ptr() or len(old) != len(room) or end > room.shape[2]:
            room = self._room[place] = old.new_empty(*old.shape[:2], 2 * end, old.shape[3])
            room[:, :, :before] = old
        room.narrow(2, before, end - before).copy_(new)
        self.states[place] = whole = room.narrow(2, 0, end)
        return whole

    def select(self, rows: Tensor) -> None:
        """Keep these rows [B'] int64 of the batch, in this order and as often as they are named."""
        self.states = {name: state.index_select(0, rows.to(state.device)) for name, state in self.states.items()}

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens. ValueError where what they left is gone, as a recurrent layer's state is."""
        for name, state in self.states.items():
            if not name.endswith((".k", ".v")) or state.shape[2] != self.length:
                raise ValueError(f"{name} keeps no more than the next token needs; the cache cannot be shortened")
        self.states = {name: state[:, :, :length] for name, state in self.states.items()}
        self.length = length
