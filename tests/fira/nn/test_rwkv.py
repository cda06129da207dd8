"""Time mixing of RWKV-5 compared with a token-by-token recurrence, and its initial values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fira.models.microrwkv import MicroRWKVConfig
from fira.models.registry import build
from fira.nn.context import Context
from fira.nn.rwkv import TimeMix, recurrence
from tests import reference_models as reference


@pytest.mark.parametrize("decay", [-8.0, -1.0, 2.0, 6.0])
@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_chunked_recurrence_equals_token_by_token_recurrence(decay: float, chunk: int) -> None:
    """Compare values and gradients from a given state in float64 and fp32; w is 0.9997 to exp(−403)."""
    torch.manual_seed(0)
    length, heads = 18, 2
    r, k, v = (torch.randn(1, heads, length, 3, dtype=torch.float64) for _ in range(3))
    decays = torch.tensor([decay, decay - 0.5], dtype=torch.float64)
    u = torch.tensor([0.7, -0.3], dtype=torch.float64)
    state = torch.randn(1, heads, 3, 3, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (r, k, v, decays, u, state)]

    def naive(r: Tensor, k: Tensor, v: Tensor, decays: Tensor, u: Tensor, state: Tensor) -> list[Tensor]:
        decay = torch.exp(-torch.exp(decays))
        return [x[None] for x in reference.recurrence(r[0], k[0], v[0], decay, u, state[0])]

    def results(function: Callable[..., Any], values: list[Tensor]) -> list[Tensor]:
        outputs = list(function(*values))
        return outputs + list(torch.autograd.grad(sum(out.sin().sum() for out in outputs), values))

    def chunked(r: Tensor, k: Tensor, v: Tensor, decays: Tensor, u: Tensor, state: Tensor) -> Any:
        return recurrence(r, k, v, -decays.exp(), u, state, chunk)

    expected = results(naive, inputs)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        ours = results(chunked, [x.detach().to(dtype).requires_grad_() for x in inputs])
        for one, other in zip(ours, expected, strict=True):
            assert one.isfinite().all()
            assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max())


def test_recurrence_continues_from_a_returned_state() -> None:
    torch.manual_seed(0)
    r, k, v = (torch.randn(2, 3, 30, 4, dtype=torch.float64) for _ in range(3))
    settings = torch.tensor([-0.1, -2.0, -0.01], dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    full, last = recurrence(r, k, v, *settings, chunk=8)
    parts, state = [], None
    for tokens in (slice(0, 11), slice(11, 12), slice(12, 30)):
        y, state = recurrence(r[:, :, tokens], k[:, :, tokens], v[:, :, tokens], *settings, state, chunk=8)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), full, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_time_mix_in_bf16_is_close_to_fp32() -> None:
    """A thousand tokens, with decays from almost 1 to almost 0."""
    torch.manual_seed(0)
    mix = TimeMix(16, 4, 1, 2, "time_mix")
    with torch.no_grad():
        for name, parameter in mix.named_parameters():
            parameter.normal_(std=0.3) if "weight" in name else parameter.uniform_(0, 1)
        mix.decay.copy_(torch.tensor([-12.0, -3.0, 1.0, 9.0]))
    x = torch.randn(1, 1000, 16)
    exact = mix(x, Context(), "")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mix(x, Context(), "")
    rounded.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mix.parameters())
    assert (rounded - exact).abs().mean() < 0.02 * exact.abs().mean()


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (3, 4)])
def test_time_mix_initial_values(layers: int, heads: int) -> None:
    model = build(MicroRWKVConfig(vocab_size=31, d_model=24, num_layers=layers, n_head=heads, n_group=1, d_moe=10))
    for layer in range(layers):
        mix = model.layers[layer + 1].time_mix
        rho, sigma = layer / max(1, layers - 1), 1 - layer / layers
        for i in (0, 5, 23):
            a = i / 24
            assert mix.maa_k[i].item() == pytest.approx(1 - a**sigma, abs=1e-6)
            assert mix.maa_v[i].item() == pytest.approx(1 - (a**sigma + 0.3 * rho), abs=1e-6)
            assert mix.maa_r[i].item() == mix.maa_g[i].item() == pytest.approx(1 - a ** (sigma / 2), abs=1e-6)
        for h in range(heads):
            place = h / max(1, heads - 1)
            assert mix.decay[h].item() == pytest.approx(-6 + 5 * place ** (0.7 + 1.3 * rho), abs=1e-5)
            assert mix.bonus[h].item() == pytest.approx(rho * (1 - place), abs=1e-6)
