"""Key-value cache of a batch of texts that begin and end at different times.

Shapes: B texts, the longest of L tokens; H heads of hd channels. All texts end at the same column, so that one step
writes one column:

    column                   origin                end
    text 0   (5 tokens)         k    k    k    k    k    ·        k  keys and values of a token
    text 1   (2 tokens)                        k    k    ·        ·  written by the next step
    text 2   (3 tokens)                   k    k    k    ·

A text that joins is copied to the columns before `end`. When `end` reaches the last column, all texts are moved to the
left. A text that leaves is replaced by the last one.
"""

import torch
from torch import Tensor

from fira.nn.kv_cache import KVCache


class BatchCache(KVCache):
    """Cache of at most `rows` texts of at most `seq_len` tokens; `length` is L.

    `states` holds only the states of recurrent layers. Keys and values are in buffers [rows, H, columns, hd], which are
    allocated when the first text joins.
    """

    def __init__(self, rows: int, seq_len: int) -> None:
        super().__init__()
        self._rows, self._seq_len = rows, seq_len
        self._columns = seq_len + max(64, seq_len // 4)  # the texts are moved once in this many steps more than seq_len
        self._buffers: dict[str, Tensor] = {}
        self._begins: list[int] = []  # first column of each text
        self._origin = seq_len  # the least of them

    @property
    def _end(self) -> int:
        return self._origin + self.length

    def nbytes(self) -> int:
        """The size of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def join(self, text: KVCache) -> None:
        """Add the cache of a single text as the last row."""
        row, end = len(self._begins), self._end
        for name, state in text.states.items():
            if name.endswith((".k", ".v")):
                buffer = self._buffers.get(name)
                if buffer is None:
                    shape = (self._rows, state.shape[1], self._columns, state.shape[3])
                    buffer = self._buffers[name] = state.new_zeros(shape)  # masked values must be finite
                buffer[row, :, end - state.shape[2] : end] = state[0]
            else:
                self.states[name] = torch.cat([self.states[name], state]) if row else state
        self._begins.append(end - text.length)
        self._fit(end)

    def leave(self, row: int) -> None:
        """Remove a text. The last one takes its row."""
        last, end = len(self._begins) - 1, self._end
        columns = slice(self._begins[last], end)
        for buffer in self._buffers.values():
            if row != last:
                buffer[row, :, columns] = buffer[last, :, columns]
        kept = [last if index == row else index for index in range(last)]
        self.states = {name: state[kept] for name, state in self.states.items()}
        self._begins[row] = self._begins[last]
        del self._begins[last]
        self._fit(end)

    def starts(self) -> list[int]:
        """Prepare the next step, and return how many columns before each text belong to longer texts only."""
        if self._end == self._columns:
            self._move_left()
        return [begin - self._origin for begin in self._begins]

    def extend(self, name: str, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Write a module's keys and values [B, H, 1, hd] of one step; return those that the step attends to."""
        end = self._end + 1
        first = self._origin if window is None else max(self._origin, end - window)
        both = []
        for place, new in ((f"{name}.k", k), (f"{name}.v", v)):
            buffer = self._buffers[place][: len(new)]
            buffer[:, :, end - 1 : end] = new
            both.append(buffer[:, :, first:end])
        return both[0], both[1]

    def _fit(self, end: int) -> None:
        """Set origin and length for texts that end before column `end`."""
        self._origin = min(self._begins, default=self._seq_len)
        self.length = end - self._origin if self._begins else 0

    def _move_left(self) -> None:
        """Move all texts so that they end at column seq_len, with room for one of any length."""
        rows, end = len(self._begins), self._end
        for buffer in self._buffers.values():
            old = buffer[:rows, :, self._origin : end].clone()
            buffer[:rows, :, self._seq_len - self.length : self._seq_len] = old
        self._begins = [begin - end + self._seq_len for begin in self._begins]
        self._fit(self._seq_len)
