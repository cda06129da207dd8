"""Documents packed into sequences, and the modules that tell them apart, against each document by itself."""

import math

import pytest
import torch

from fira.nn.context import Context, TrainingContext
from fira.nn.documents import Documents
from fira.nn.dropout import token_keys
from fira.nn.moe.aux_losses import even_weights, load_balance, router_z, small_outputs
from fira.nn.moe.capacity import within_capacity
from fira.nn.moe.router import Routed
from fira.nn.moe.token_means import TokenMeans
from fira.nn.rotary import Rotary
from fira.nn.rwkv import recurrence
from tests import reference_models as reference
from tests.fira.nn.packed_documents import pack, spans

LENGTHS = [[4, 1, 3], [9], [2, 6, 1], []]
LENGTH = 9
PACKED = pack(LENGTHS, LENGTH)


def test_positions_and_lengths() -> None:
    documents = Documents.of(torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2, -1, -1], [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4]]))
    assert documents.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1], [0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]]
    assert documents.lengths.tolist() == [[4, 4, 4, 4, 2, 2, 3, 3, 3, 2, 2], [1, 1, 1, 1, 7, 7, 7, 7, 7, 7, 7]]


def test_context_counts_positions_and_draws_keys_by_document() -> None:
    keys = torch.randint(2**62, (4, 3), generator=torch.Generator().manual_seed(0))
    context, x = Context(documents=PACKED, keys=keys), torch.zeros(4, LENGTH, 2)
    assert context.valid(x).sum(1).tolist() == [8, 9, 9, 0]
    drawn = context.token_keys(x)
    assert drawn is not None
    for row, number, span in spans(LENGTHS):
        count = span.stop - span.start
        assert context.positions(x)[row, span].tolist() == list(range(count))
        assert torch.equal(drawn[row, span], token_keys(keys[row, number][None], 0, count)[0])


def test_context_is_split_by_sequences() -> None:
    training = TrainingContext(aux_weights=torch.rand(4, 3))
    context = Context(documents=PACKED, keys=torch.arange(12).view(4, 3), training=training)
    first, second = context.split([1, 3])
    assert first.documents is not None
    assert second.documents is not None
    for part, rows in ((first, slice(0, 1)), (second, slice(1, 4))):
        for one, other in zip(part.documents, PACKED, strict=True):
            assert torch.equal(one, other[rows])
        assert torch.equal(part.keys, context.keys[rows])
        assert torch.equal(part.training.aux_weights, training.aux_weights[rows])


@pytest.mark.parametrize("max_position", [None, 3])
def test_rotary_angles_are_those_of_each_document(max_position: int | None) -> None:
    rotary, x = Rotary(8, 100.0, max_position, factor=2.0), torch.randn(4, 2, LENGTH, 8, dtype=torch.float64)
    (rotated,) = rotary(LENGTH, x, documents=PACKED)
    for row, _, span in spans(LENGTHS):
        (expected,) = rotary(span.stop - span.start, x[row : row + 1, :, span])
        torch.testing.assert_close(rotated[row : row + 1, :, span], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 2, 4, 7, 64])
def test_recurrence_restarts_in_each_document(chunk: int) -> None:
    """Compare values and gradients with a loop over the tokens of each document."""
    torch.manual_seed(0)
    lengths, length = [[5, 1, 8, 3], [18], [1, 9, 2]], 18
    r, k, v = (torch.randn(3, 2, length, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    decays = torch.tensor([-3.0, -0.5], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.7, -0.3], dtype=torch.float64, requires_grad=True)
    documents = pack(lengths, length)
    y, _ = recurrence(r, k, v, -decays.exp(), u, chunk=chunk, documents=documents.numbers)
    expected = torch.zeros_like(y)
    for row, _, at in spans(lengths):
        state, inputs = torch.zeros(2, 3, 3, dtype=torch.float64), (x[row, :, at] for x in (r, k, v))
        expected[row, :, at] = reference.recurrence(*inputs, torch.exp(-torch.exp(decays)), u, state)[0]
    y = y * (documents.numbers >= 0)[:, None, :, None]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = [r, k, v, decays, u]
    gradients = (torch.autograd.grad(out.sin().sum(), inputs) for out in (y, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [0.3, 1.0, 5.0])
def test_capacity_is_that_of_each_document(factor: float) -> None:
    torch.manual_seed(0)
    experts = torch.randn(4, LENGTH, 4).topk(2).indices
    valid = PACKED.numbers >= 0
    accepted = within_capacity(experts, valid, 4, factor, PACKED)
    assert not accepted[~valid].any()
    for row, _, span in spans(LENGTHS):
        free = [math.ceil(factor * 2 * (span.stop - span.start) / 4)] * 4
        for t in range(span.start, span.stop):
            for choice, e in enumerate(experts[row, t].tolist()):
                assert bool(accepted[row, t, choice]) == (free[e] > 0)
                free[e] -= free[e] > 0


def test_auxiliary_losses_are_those_of_each_document() -> None:
    torch.manual_seed(0)
    logits, outputs = torch.randn(4, LENGTH, 5, dtype=torch.float64), torch.randn(4, LENGTH, 2, 3, dtype=torch.float64)
    routed = Routed(logits.topk(2).indices, logits.softmax(-1).topk(2).values, logits)
    means = TokenMeans(PACKED.numbers >= 0, PACKED, count=3)
    for loss in (even_weights, load_balance, router_z, small_outputs):
        losses = loss(routed, lambda: outputs, means)
        assert losses.shape == (4, 3)
        for row, number, span in spans(LENGTHS):
            one = Routed(*(part[row : row + 1, span] for part in routed))
            part = outputs[row : row + 1, span]
            every = TokenMeans(torch.ones(part.shape[:2], dtype=torch.bool))
            (expected,) = loss(one, lambda part=part: part, every)
            torch.testing.assert_close(losses[row, number], expected, rtol=1e-12, atol=0)
