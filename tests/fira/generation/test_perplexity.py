"""Perplexity against one forward pass per token."""

import math
from dataclasses import replace

import pytest
import torch

from fira.errors import UserError
from fira.generation.perplexity import TextLoss, perplexity
from tests.fira.small_model import CONFIG, make_model


@pytest.mark.parametrize("count", [2, 3, 12, 13, 14, 18, 19, 40, 100])
def test_perplexity_counts_every_token_once(count: int) -> None:
    """Predict each token in a forward of its own: the first window, then half a window at a time."""
    model = make_model()
    ids = torch.randint(300, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    length, half, total = CONFIG.seq_len, CONFIG.seq_len // 2, 0.0
    for i in range(1, count):
        end = length if i <= length else length + half * math.ceil((i - length) / half)
        start = max(0, min(end, count - 1) - length)
        logits = model(torch.tensor([ids[start:i]]))[0, -1]
        total -= logits.double().log_softmax(-1)[ids[i]].item()
    loss = perplexity(model.train(), ids)  # dropout is disabled in train mode, too
    assert loss.tokens == count - 1
    assert loss.nats == pytest.approx(total / (count - 1), rel=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(total / (count - 1)), rel=1e-4)


def test_uniform_model_has_the_vocabulary_size_as_perplexity() -> None:
    model = make_model(replace(CONFIG, vocab_size=256))
    with torch.no_grad():
        model.layers[-1].project.weight.zero_()
    loss = perplexity(model.train(), torch.arange(51))
    assert loss.perplexity == pytest.approx(256, rel=1e-5)
    assert loss.bits_per_byte(100) == pytest.approx(8 * 50 / 100, rel=1e-6)


def test_text_requires_two_tokens_of_the_vocabulary() -> None:
    for ids, message in (([], "at least two"), ([5], "at least two"), ([5, 300], "vocabulary of 300")):
        with pytest.raises(UserError, match=message):
            perplexity(make_model(), ids)


def test_mean_of_several_texts_is_weighted_by_tokens() -> None:
    loss = TextLoss.mean([TextLoss(1.0, 30), TextLoss(2.0, 10)])
    assert (loss.nats, loss.tokens) == (1.25, 40)


@torch.no_grad()
def test_documents_that_are_kept_apart_have_the_loss_of_each_by_itself() -> None:
    """Token 0 begins a document. All are shorter than half a context, so that no window cuts off what a token sees."""
    model, total = make_model().eval(), 0.0
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, *torch.randint(1, CONFIG.seq_len // 2, (20,), generator=generator).tolist()]
    documents = [[0, *torch.randint(1, 300, (length - 1,), generator=generator).tolist()] for length in lengths]
    for document, following in zip(documents, [*documents[1:], []], strict=True):
        logits = model(torch.tensor([document]))[0].double().log_softmax(-1)
        targets = [*document[1:], *following[:1]]
        total -= sum(logits[i, target].item() for i, target in enumerate(targets))
    ids = [token for document in documents for token in document]
    assert perplexity(model, ids, separator=0).nats == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert perplexity(model, ids).nats != pytest.approx(total / (len(ids) - 1), rel=1e-3)
