"""Cache of keys, values and recurrent states of earlier tokens, for decoding."""

import torch
from torch import Tensor


class KVCache:
    """Keys, values and states of the `length` tokens that have been processed.

    `states` holds keys and values [B, H, T, hd] of attention layers under `<module>.k` and `<module>.v`, and states of
    constant size of recurrent layers; all by the global name of the module.
    """

    def __init__(self) -> None:
        self.length = 0
        self.states: dict[str, Tensor] = {}
        self._room: dict[str, Tensor] = {}  # buffers with spare capacity, of which keys and values are views

    def extend(self, name: str, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Append a module's new keys and values [B, H, T, hd] and return all of them.

        window: number of tokens, itself included, that a token attends to; older keys and values are removed.
        """
        return self._append(f"{name}.k", k, window), self._append(f"{name}.v", v, window)

    def _append(self, place: str, new: Tensor, window: int | None) -> Tensor:
        """Concatenate along dim 2. If the buffer has enough capacity, only the new entries are written."""
        old = self.states[place] if place in self.states else new[:, :, :0]
        before, end = old.shape[2], old.shape[2] + new.shape[2]
        if torch.is_grad_enabled() or window is not None:
            joined = torch.cat([old, new], dim=2)
            self.states[place] = joined if window is None else joined[:, :, max(0, end - window + 1) :]
            return joined
        room = self._room.get(place)
        if room is None or old.data_ptr() != room.data_ptr() or len(old) != len(room) or end > room.shape[2]:
            room = self._room[place] = old.new_empty(*old.shape[:2], 2 * end, old.shape[3])
            room[:, :, :before] = old
        room.narrow(2, before, end - before).copy_(new)
        self.states[place] = joined = room.narrow(2, 0, end)
        return joined

    def row(self, row: int, length: int) -> "KVCache":
        """The cache of one row, which holds its last `length` tokens; those before are padding."""
        cache = KVCache()
        cache.length = length
        for name, state in self.states.items():
            own = state[row : row + 1]
            cache.states[name] = own[:, :, -length:] if name.endswith((".k", ".v")) else own
        return cache

    def select(self, rows: Tensor) -> None:
        """Index the batch dimension by rows [B'] int64; rows may repeat."""
        self.states = {name: state.index_select(0, rows.to(state.device)) for name, state in self.states.items()}

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens. Raises ValueError if a state or a window no longer holds them."""
        for name, state in self.states.items():
            if not name.endswith((".k", ".v")) or state.shape[2] != self.length:
                raise ValueError(f"{name} does not hold earlier tokens; the cache cannot be shortened")
        self.states = {name: state[:, :, :length] for name, state in self.states.items()}
        self.length = length
