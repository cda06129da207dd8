"""Attention with key and value heads that several query heads share, on GPUs without FlashAttention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fira.nn import attention
from fira.nn.attention import SelfAttention
from fira.nn.context import Context

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(("capability", "lacks"), [((7, 0), True), ((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_devices_without_flash_attention(monkeypatch, capability, lacks) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention._lacks_flash_attention(CUDA) == lacks
    assert not attention._lacks_flash_attention(torch.device("cpu"))


def test_shared_heads_are_repeated_where_the_kernel_does_not_share_them(monkeypatch) -> None:
    calls = []
    sdpa = F.scaled_dot_product_attention

    def recorded(q, k, v, mask, is_causal, enable_gqa):
        calls.append((k.shape[1], v.shape[1], enable_gqa))
        return sdpa(q, k, v, mask, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    torch.manual_seed(0)
    layer = SelfAttention(12, 6, "attention", nn.Linear, n_kv_head=2).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    results = []
    for lacks in (False, True):
        monkeypatch.setattr(attention, "_lacks_flash_attention", lambda device, lacks=lacks: lacks)
        y = layer(x, Context())
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert calls == [(2, 2, True), (6, 6, False)]
    for shared, repeated in zip(*results, strict=True):
        torch.testing.assert_close(shared, repeated, rtol=1e-12, atol=1e-12)
