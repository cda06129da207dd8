"""Models over several local devices equal the plain models."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fira import FIRA, create_pipeline_model
from fira.nn.context import Context
from tests.fira.models import small_families
from tests.fira.models.small_families import CONFIGS, families, make_tokens
from tests.fira.models.small_fira import CONFIG, batch, make_model, mean_loss


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("devices", [1, 3])
def test_pipeline_model_equals_plain_model(devices: int, recompute: bool) -> None:
    config = replace(CONFIG, dropout=0.2)
    tokens, targets, _ = batch(config)
    plain, split = make_model(config), make_model(config)
    pipelined = create_pipeline_model(split, ["cpu"] * devices, chunks=2, recompute=recompute)
    assert [name for name, _ in pipelined.named_parameters()] == [name for name, _ in plain.named_parameters()]
    logits = []
    for module in (plain, pipelined):
        torch.manual_seed(5)  # seeds the dropout of a call without context
        logits.append(module(tokens))
        mean_loss(logits[-1], targets).backward()
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-12, atol=1e-12)
    for parameter, other in zip(plain.parameters(), pipelined.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-10, atol=1e-12)
    assert not torch.equal(pipelined.eval()(tokens), logits[1])  # in eval mode there is no dropout


def test_pipeline_model_of_a_config_has_the_initial_values_of_the_model() -> None:
    tokens = batch()[0]
    pipelined = create_pipeline_model(CONFIG, ["cpu", "cpu"])
    torch.testing.assert_close(pipelined(tokens), FIRA(CONFIG)(tokens), rtol=1e-5, atol=1e-5)


@families
@pytest.mark.parametrize("recompute", [False, True])
def test_pipeline_model_of_every_family_equals_plain_model(name: str, recompute: bool) -> None:
    """Including tied weights, which torchgpipe itself does not support."""
    tokens = make_tokens(CONFIGS[name], batch=4)
    plain, split = small_families.make_model(CONFIGS[name]), small_families.make_model(CONFIGS[name])
    pipelined = create_pipeline_model(split, ["cpu"] * 3, chunks=2, recompute=recompute)
    assert [path for path, _ in pipelined.named_parameters()] == [path for path, _ in plain.named_parameters()]
    for _ in range(2):
        logits = [module(tokens, Context()) for module in (plain, pipelined)]
        for output in logits:
            F.cross_entropy(output.flatten(0, 1), tokens.flatten()).backward()
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-12, atol=1e-12)
        for parameter, other in zip(plain.parameters(), pipelined.parameters(), strict=True):
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-10, atol=1e-12)
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
                other -= 0.1 * other.grad


def test_autocast_is_in_effect_in_the_threads_of_torchgpipe() -> None:
    tokens = batch(CONFIG)[0]
    plain, low = make_model(CONFIG).float(), make_model(CONFIG).float()
    pipelined = create_pipeline_model(low, ["cpu", "cpu"], chunks=2, autocast=torch.bfloat16)
    dtypes = []
    for block in low.layers[1:-1]:
        block.moe.experts.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    logits = pipelined(tokens)
    assert set(dtypes) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(tokens)
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)
