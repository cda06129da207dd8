"""Models of all families: reference implementations, causality, and gradients in bf16."""

import pytest
import torch
import torch.nn.functional as F

from fira.nn.context import Context, TrainingContext
from tests import reference_models as reference
from tests.fira.models.small_families import CONFIGS, SMALL, families, make_model, make_tokens


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_models_equal_reference_implementations(name: str, dtype: torch.dtype, tolerance: float) -> None:
    config = CONFIGS[name]
    model, tokens = make_model(config, dtype), make_tokens(config)
    context = Context(training=TrainingContext(aux_weights=torch.tensor([0.3, 0.7], dtype=dtype)))
    logits = model(tokens, context)
    targets = tokens.roll(1, 1)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    p = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    pairs = [reference.FAMILIES[name.partition("-")[0]](sequence, p, config) for sequence in tokens]
    expected = torch.stack([pair[0] for pair in pairs])
    aux = 0.3 * pairs[0][1] + 0.7 * pairs[1][1]
    (F.cross_entropy(expected.flatten(0, 1), targets.flatten()) + aux).backward()

    assert (logits - expected).abs().max() < tolerance * expected.abs().max()
    assert sum(float(s.aux) for s in context.training.stats.values()) == pytest.approx(aux.item(), rel=tolerance)
    for path, parameter in model.named_parameters():
        assert p[path].grad.abs().max() > 0, f"{path} has no gradient in this test"
        assert (parameter.grad - p[path].grad).abs().max() < tolerance * max(1.0, p[path].grad.abs().max()), path


@families
def test_no_information_flows_from_later_tokens_or_other_sequences(name: str) -> None:
    """The tolerance allows for another order of summation, if the changed token is routed to other experts."""
    model, tokens = make_model(CONFIGS[name]), make_tokens(CONFIGS[name])
    before = model(tokens, Context())
    for t in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[1, t] = (changed[1, t] + 1) % SMALL["vocab_size"]
        difference = (model(changed, Context()) - before).abs()
        assert difference[0].max() < 1e-12
        assert difference[1, :t].sum() < 1e-12
        assert difference[1, t].max() > 1e-6


@families
def test_bf16_gradients_are_close_to_fp32(name: str) -> None:
    gradients = []
    for enabled in (False, True):
        model, tokens = make_model(CONFIGS[name], torch.float32), make_tokens(CONFIGS[name])
        context = Context(keys=torch.arange(2), training=TrainingContext(aux_weights=torch.full((2,), 0.5)))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(tokens, context).float()
        F.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    exact, rounded = gradients
    assert not torch.equal(rounded, exact)
    assert F.cosine_similarity(rounded, exact, dim=0) > 0.95
