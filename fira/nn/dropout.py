"""Dropout whose mask is a pure function of (sequence key, position, place in the model, channel).

There is no generator and no state: the mask does not depend on the rank, the micro-batch, the device or the order of
execution, recomputing a layer gives the same mask, and checkpoints need no random state. On a CPU the cost is not
higher than that of a generator.
"""

import math
import zlib

import torch
from torch import Tensor, nn

from fira.nn.kernels.fused import use_fused


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


# Odd multipliers of a 32-bit integer hash (multiply, xor-shift, multiply), chosen by Wellons for low bias.
_FIRST, _SECOND, _GOLDEN = _signed(0x7FEB352D), _signed(0x846CA68B), _signed(0x9E3779B9)


def _mix(x: Tensor) -> Tensor:
    """Bijection of int32 in which every output bit depends on every input bit."""
    x = x * _FIRST
    x = x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x = x.mul_(_SECOND)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def token_keys(keys: Tensor, start: int, length: int) -> Tensor:
    """[B] int64 sequence keys → [B, length] int32 keys of their tokens at positions start, start + 1, …"""
    if use_fused(keys):
        from fira.nn.kernels.hash_dropout import fused_token_keys

        return fused_token_keys(keys, start, length)
    return token_keys_at(keys[:, None], torch.arange(start, start + length, dtype=torch.int32, device=keys.device))


def token_keys_at(keys: Tensor, positions: Tensor) -> Tensor:
    """int64 sequence keys and positions of tokens, of shapes that broadcast → int32 keys of the tokens."""
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)
    return _mix(_mix(low + positions.to(torch.int32) * _GOLDEN) ^ high)


def random_bits(rows: Tensor, columns: int) -> Tensor:
    """[…] int32 row keys → […, columns] int32, uniform; the high bits are of better quality than the low ones."""
    channel = _mix(torch.arange(1, columns + 1, dtype=torch.int32, device=rows.device))
    bits = rows[..., None] ^ channel
    bits.mul_(_FIRST)
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF))
    return bits.mul_(_SECOND)  # the high bits, which decide comparisons, depend on all bits of row and channel


def keep_mask(rows: Tensor, columns: int, p: float) -> Tensor:
    """[…] int32 row keys → […, columns] bool, each entry true with probability 1 − p."""
    return random_bits(rows, columns) >= _threshold(p)


def _threshold(p: float) -> int:
    """The int32 that a random int32 is less than with probability p."""
    return round(p * 2**32) - 2**31


def normal(rows: Tensor, columns: int) -> Tensor:
    """[…] int32 row keys → […, columns] float64 from the standard normal distribution (Box & Muller 1958)."""
    uniform = (random_bits(rows, 2 * columns).double() + (2**31 + 0.5)) / 2**32  # inside (0, 1)
    radius, angle = uniform.chunk(2, dim=-1)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


def salt(name: str) -> int:
    """A number for a module, derived from its global name."""
    return _signed(zlib.crc32(name.encode()))


def at_place(rows: Tensor, salt: int | Tensor) -> Tensor:
    """[…] int32 token keys → row keys for the module with this salt."""
    return _mix(rows ^ salt)


class Dropout(nn.Module):
    """Zero a fraction p of the channels of each row and scale the rest by 1 / (1 − p).

    name: the module's global name; modules with different names draw different masks.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout probability {p} is not in [0, 1)")
        self.p = p
        self.salt: int | Tensor = salt(name)

    @property
    def hash_arguments(self) -> tuple[int, int, float]:
        """Arguments of the fused kernels: salt, threshold of kept random bits, and scale of kept values."""
        return int(self.salt), _threshold(self.p), 1 / (1 - self.p)

    def forward(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """x: […, C]; rows: […] int32 token keys, or None for no dropout."""
        if self.p == 0 or rows is None:
            return x
        if use_fused(x):
            from fira.nn.kernels.hash_dropout import HashDropout

            return HashDropout.apply(x, rows, *self.hash_arguments)
        keep = keep_mask(at_place(rows, self.salt), x.shape[-1], self.p)
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))
