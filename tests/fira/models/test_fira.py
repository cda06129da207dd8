"""fira compared with its reference implementation; causality, padding and micro-batches."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests import reference_models as reference
from tests.fira.models.small_fira import CONFIG, LENGTHS, batch, make_model, mean_loss


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_model_equals_reference_implementation(top_k: int, dtype: torch.dtype, tolerance: float) -> None:
    config = replace(CONFIG, top_k=top_k, aux_coefficient=0.7)
    model = make_model(config, dtype)
    tokens, targets, context = batch(config)
    logits = model(tokens, context)
    mean_loss(logits, targets).backward()

    p = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    pairs = [reference.fira(row, p, config, length) for row, length in zip(tokens, LENGTHS, strict=True)]
    expected, balance = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    aux = (balance * context.training.aux_weights).sum()
    (mean_loss(expected, targets) + aux).backward()

    assert (logits - expected).abs().max() < tolerance * expected.abs().max()
    assert sum(float(s.aux) for s in context.training.stats.values()) == pytest.approx(aux.item(), rel=tolerance)
    for name, parameter in model.named_parameters():
        assert p[name].grad.abs().max() > 0, f"{name} has no gradient in this test"
        assert (parameter.grad - p[name].grad).abs().max() < tolerance * max(1.0, p[name].grad.abs().max()), name


@pytest.mark.parametrize(("top_k", "tolerance"), [(2, 1e-13), (CONFIG.num_experts, 0.0)])
def test_no_information_flows_from_later_tokens_or_other_sequences(top_k: int, tolerance: float) -> None:
    """Bitwise if every expert is chosen by every token. Otherwise the changed token can be routed to other experts,
    and the order of summation in a product depends on its number of rows."""
    model = make_model(replace(CONFIG, top_k=top_k))
    tokens = batch()[0]
    before = model(tokens)
    for t in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[1, t] = (changed[1, t] + 1) % CONFIG.vocab_size
        difference = (model(changed) - before).abs()
        assert difference[0].max() <= tolerance
        assert difference[1, :t].sum() <= tolerance
        assert difference[1, t:].amax(1).min() > 1e-6  # later tokens do change


def test_logits_have_no_gradient_with_respect_to_later_tokens() -> None:
    model = make_model()
    tokens = batch()[0]
    embedded: list[Tensor] = []
    model.layers[0].register_forward_hook(lambda _module, _inputs, x: embedded.append(x))
    logits = model(tokens)
    for t in range(tokens.shape[1]):
        (gradient,) = torch.autograd.grad(logits[1, t].square().sum(), embedded, retain_graph=True)
        nonzero = gradient.abs().amax(2) > 0
        assert nonzero[1].tolist() == [s <= t for s in range(tokens.shape[1])]
        assert not nonzero[0].any()


def test_padding_does_not_affect_valid_tokens() -> None:
    results = []
    for padding in (0, 7):
        model = make_model()
        tokens, targets, context = batch()
        tokens[targets == -100] = padding
        logits = model(tokens, context)
        mean_loss(logits, targets).backward()
        results.append(
            (logits[targets != -100], context.training.stats, {n: p.grad for n, p in model.named_parameters()})
        )
    (logits, stats, grads), (other_logits, other_stats, other_grads) = results
    # Another padding token is routed to other experts, and rounding in a product depends on its number of rows.
    torch.testing.assert_close(logits, other_logits, rtol=1e-12, atol=1e-12)
    for key, expected in stats.items():
        assert torch.equal(expected.load, other_stats[key].load)
        assert expected.load.sum() == sum(LENGTHS) * 2
        torch.testing.assert_close(expected.aux, other_stats[key].aux, rtol=1e-12, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1], [2, 2]])
def test_auxiliary_loss_does_not_depend_on_micro_batches(sizes: list[int]) -> None:
    lengths = [9, 5, 7, 1]
    full, split = make_model(), make_model()
    tokens, _, context = batch(lengths=lengths)
    full(tokens, context).sum().backward()
    contexts = batch(lengths=lengths)[2].split(sizes)
    for chunk_context, chunk in zip(contexts, tokens.split(sizes), strict=True):
        split(chunk, chunk_context).sum().backward()
    for layer in (1, 2):
        stats = [contexts[0].training.stats[layer, chunk] for chunk in range(len(sizes))]
        assert sum(float(s.aux) for s in stats) == pytest.approx(float(context.training.stats[layer, 0].aux), rel=1e-12)
        assert torch.equal(sum(s.load for s in stats), context.training.stats[layer, 0].load)
    for (name, parameter), other in zip(full.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)
