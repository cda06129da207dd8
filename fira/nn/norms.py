"""Root-mean-square norms (Zhang & Sennrich 2019, arXiv 1910.07467), computed in fp32 or better."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Context manager that disables autocast on one type of device."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class UnitRMS(nn.Module):
    """x / (‖x‖ / √d + 1e-8), without a learned gain."""

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        return (wide / (wide.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-8)).to(x.dtype)
