"""Packed documents against each document as a sequence of its own, in all families, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fira.models.fira import FiraConfig
from fira.models.language_model import LanguageModel
from fira.nn.context import Context, MoEStats, TrainingContext
from fira.nn.cross_entropy import IGNORE_INDEX
from tests import reference_models as reference
from tests.fira.models.small_families import BLUES, CONFIGS, SMALL, make_model, make_tokens
from tests.fira.nn.packed_documents import pack, spans

LENGTH = 24
# A document of one token, one as long as the context, padding, and a sequence of padding only.
LENGTHS = [[7, 1, 11, 5], [LENGTH], [3, 10, 1], []]
FIRA = FiraConfig(**SMALL, n_head=3, d_ff=20, dropout=0.0, switch_coefficient=0.2, z_coefficient=0.1)
PLAIN = CONFIGS | {"fira": FIRA}
RANDOM = {  # dropout, noise of the router, and a capacity limit
    "fira": replace(FIRA, dropout=0.2, noise=0.3, capacity_factor=0.8),
    "blues": replace(BLUES, dropout=0.2, noise=0.3),
}
Result = tuple[float, dict[str, Tensor], list[MoEStats]]


def batch(config: Any) -> tuple[Tensor, Tensor]:
    """Tokens and targets [4, 24]. A third of the targets and those of padding are ignored."""
    tokens = make_tokens(config, len(LENGTHS), LENGTH)
    targets = tokens.roll(-1, 1).where(tokens % 3 > 0, IGNORE_INDEX)
    return tokens, targets.where(pack(LENGTHS, LENGTH).numbers >= 0, IGNORE_INDEX)


def aux_weights() -> Tensor:
    """[4, 4], the weight of each document: its share of all tokens."""
    weights = torch.zeros(4, 4, dtype=torch.float64)
    for row, number, span in spans(LENGTHS):
        weights[row, number] = (span.stop - span.start) / 62
    return weights


def packed(model: LanguageModel, tokens: Tensor, targets: Tensor, keys: Tensor | None) -> Result:
    training = TrainingContext(targets, aux_weights=aux_weights())
    context = Context(documents=pack(LENGTHS, LENGTH), keys=keys, training=training)
    loss = model(tokens, context).sum()
    loss.backward()
    return loss.item(), gradients(model), [stats for _, stats in sorted(training.stats.items())]


def one_by_one(model: LanguageModel, tokens: Tensor, targets: Tensor, keys: Tensor | None) -> Result:
    """The sum over the documents, each of which is a sequence without padding."""
    total, sums = 0.0, []
    for row, number, span in spans(LENGTHS):
        training = TrainingContext(targets[row : row + 1, span], aux_weights=aux_weights()[row, number][None])
        context = Context(keys=None if keys is None else keys[row, number][None], training=training)
        loss = model(tokens[row : row + 1, span], context).sum()
        loss.backward()
        total += loss.item()
        sums.append([stats for _, stats in sorted(training.stats.items())])
    return total, gradients(model), [add(layer) for layer in zip(*sums, strict=True)]


def add(parts: tuple[MoEStats, ...]) -> MoEStats:
    return MoEStats(*(sum(getattr(part, name) for part in parts) for name in ("load", "dropped", "entropy", "aux")))


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    """Return the gradients by name, and clear them."""
    result = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return result


def assert_equal(one: Result, other: Result) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    for name, gradient in other[1].items():
        assert gradient.abs().max() > 0, f"{name} has no gradient in this test"
        assert (one[1][name] - gradient).abs().max() < 1e-12 * max(1.0, gradient.abs().max()), name
    for left, right in zip(one[2], other[2], strict=True):
        for name in ("load", "dropped", "entropy", "aux"):
            torch.testing.assert_close(getattr(left, name), getattr(right, name), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_packed_documents_equal_single_documents(name: str) -> None:
    model, tokens = make_model(PLAIN[name]), batch(PLAIN[name])
    assert_equal(packed(model, *tokens, None), one_by_one(model, *tokens, None))


@pytest.mark.parametrize("name", RANDOM)
def test_packed_documents_have_the_masks_and_capacity_of_single_documents(name: str) -> None:
    model, tokens = make_model(RANDOM[name]).train(), batch(RANDOM[name])
    keys = torch.randint(2**62, (4, 4), generator=torch.Generator().manual_seed(3))
    together = packed(model, *tokens, keys)
    assert_equal(together, one_by_one(model, *tokens, keys))
    assert abs(together[0] - packed(model, *tokens, keys + 1)[0]) > 1e-3  # the masks affect the loss
    assert (sum(int(stats.dropped.sum()) for stats in together[2]) > 0) == (name == "fira")


@pytest.mark.parametrize("name", PLAIN)
def test_logits_equal_reference_implementations(name: str) -> None:
    """Written-out models, one document at a time."""
    config = PLAIN[name]
    model, (tokens, _) = make_model(config), batch(config)
    weights = {path: value.detach() for path, value in model.named_parameters()}
    logits = model(tokens, Context(documents=pack(LENGTHS, LENGTH)))
    for row, _, span in spans(LENGTHS):
        expected, _ = reference.FAMILIES[name.partition("-")[0]](tokens[row, span], weights, config)
        assert (logits[row, span] - expected).abs().max() < 1e-10 * expected.abs().max()
