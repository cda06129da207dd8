"""Settings of adapters, and the names of their parameters."""

import re

import pytest

from fira.errors import UserError
from fira.nn.lora import FORM, Lora, adapter_names


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
