import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from fira.data.ngram import trigram_loss, unigram_loss


class DictionaryModel:
    """Reference implementation of interpolated Kneser–Ney: the formula on dictionaries of tuples."""

    def __init__(self, ids: list[int], vocab: int, order: int) -> None:
        self.vocab, self.order = vocab, order
        self.counts: list[Counter] = [Counter() for _ in range(order + 1)]
        self.counts[order] = Counter(tuple(ids[i : i + order]) for i in range(len(ids) - order + 1))
        for n in range(order - 1, 0, -1):
            predecessors = defaultdict(set)
            for gram in self.counts[n + 1]:
                predecessors[gram[1:]].add(gram[0])
            self.counts[n] = Counter({gram: len(tokens) for gram, tokens in predecessors.items()})

    def p(self, context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        lower = self.p(context[1:], token) if context else 1 / self.vocab
        followers = {gram[-1]: c for gram, c in self.counts[n].items() if gram[:-1] == context}
        if not followers:
            return lower
        values = list(self.counts[n].values())
        n1, n2 = values.count(1) + 0.5, values.count(2) + 0.5
        discount = n1 / (n1 + 2 * n2)
        discounted = max(followers.get(token, 0) - discount, 0)
        return (discounted + discount * len(followers) * lower) / sum(followers.values())


@pytest.fixture
def ids() -> tuple[list[int], list[int]]:
    draw = np.random.default_rng(0).zipf(1.3, 900) % 40
    return draw[:700].tolist(), [*draw[700:].tolist(), 45, 3, 4]  # 45 is not in the training tokens


def test_losses_equal_the_reference_implementation(ids) -> None:
    train, val = ids
    trigram, unigram = DictionaryModel(train, 46, 3), DictionaryModel(train, 46, 1)
    expected = -np.mean([math.log(trigram.p((val[i - 2], val[i - 1]), val[i])) for i in range(2, len(val))])
    assert trigram_loss(np.array(train), np.array(val)) == pytest.approx(expected, rel=1e-12)
    expected = -np.mean([math.log(unigram.p((), token)) for token in val])
    assert unigram_loss(np.array(train), np.array(val)) == pytest.approx(expected, rel=1e-12)


def test_reference_probabilities_sum_to_one(ids) -> None:
    model = DictionaryModel(ids[0], 46, 3)
    for context in ((1, 2), (1, 1), (45, 45), (45, 1)):
        assert sum(model.p(context, token) for token in range(46)) == pytest.approx(1)


def test_trigrams_but_not_unigrams_predict_a_repeated_sequence() -> None:
    train, val = np.tile(np.arange(16), 500), np.tile(np.arange(16), 9)
    assert unigram_loss(train, val) == pytest.approx(math.log(16), rel=1e-3)
    assert trigram_loss(train, val) < 0.01


def test_largest_ids_whose_trigrams_fit_in_63_bits() -> None:
    train = np.array([2_000_000, 1_999_999, 2_000_000, 1_999_999, 7], np.uint32)
    model = DictionaryModel(train.tolist(), 2_000_001, 3)
    expected = -np.mean([math.log(model.p(tuple(train[i - 2 : i].tolist()), int(train[i]))) for i in range(2, 5)])
    assert trigram_loss(train, train) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="63 bits"):
        trigram_loss(train * 2, train)
