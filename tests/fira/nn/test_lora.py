"""Settings of adapters, and a linear layer with an adapter."""

import re

import pytest
import torch
from torch import nn

from fira.errors import UserError
from fira.nn.init import initialise
from fira.nn.lora import FORM, Lora, LoraLinear, adapter_names


def test_settings_are_parsed_and_written_in_the_order_of_the_targets() -> None:
    lora = Lora.parse("alpha=16,targets=head+attention,rank=8")
    assert lora == Lora(8, 16.0, ("attention", "head"))
    assert lora.scale == 2.0
    assert str(lora) == "rank=8,alpha=16,targets=attention+head"
    assert Lora.parse(str(lora)) == lora
    assert str(Lora.parse(FORM)) == FORM


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank=8,alpha=16,targets=attention+mlp", "no target 'mlp'; the targets are attention, experts, head"),
        ("rank=8,alpha=16,targets=", "no target ''"),
        ("rank=0,alpha=16,targets=head", "give an integer from 1 to 262,144, not '0'"),
        ("rank=two,alpha=16,targets=head", "not 'two'"),
        ("rank=8,alpha=-1,targets=head", "give a number greater than 0, not '-1'"),
        ("rank=8,alpha=nan,targets=head", "not 'nan'"),
        ("rank=8,targets=head", "give rank, alpha and targets once each"),
        ("rank=8,alpha=16,targets=head,dropout=0.1", "once each"),
        ("rank=8,rank=9,alpha=16,targets=head", "once each"),
        ("8", "once each"),
        ("x" * 1000, "once each"),
    ],
)
def test_invalid_settings_raise_one_short_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Lora.parse(text)
    assert str(error.value).startswith("--lora ")
    assert len(str(error.value)) < 250


def test_adapters_have_names_of_their_own() -> None:
    names = adapter_names("layers.3.attention.q.weight")
    assert names == ("layers.3.attention.q.lora_a.weight", "layers.3.attention.q.lora_b.weight")
    names = adapter_names("layers.3.moe.experts.w1")
    assert names == ("layers.3.moe.experts.lora.w1.a", "layers.3.moe.experts.lora.w1.b")


@pytest.mark.parametrize("bias", [False, True])
def test_linear_layer_with_adapter_multiplies_by_the_sum(bias: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 7, bias=bias).double().requires_grad_(False)
    layer = LoraLinear(base, Lora(3, 6.0, ("head",)))
    assert layer.weight is base.weight
    initialise(layer, "layers.0.q", 0)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
    a, b = layer.lora_a.weight, layer.lora_b.weight
    assert (a.shape, b.shape) == ((3, 5), (7, 3))
    assert a.abs().max() <= 5**-0.5
    nn.init.normal_(b)
    dense = (layer.weight + 2 * b @ a).detach().requires_grad_()
    expected = nn.functional.linear(x, dense, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    layer(x).backward(grad)
    torch.testing.assert_close(a.grad, 2 * b.T @ dense.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(b.grad, 2 * dense.grad @ a.T, rtol=1e-12, atol=1e-13)
    assert layer.weight.grad is None
