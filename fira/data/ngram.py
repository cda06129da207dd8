"""Baselines for the loss: unigram and trigram models, in nats per token.

Interpolated Kneser–Ney (Kneser and Ney 1995; Chen and Goodman 1998, section 3). For a context h of n(h·) tokens,
    p(w | h) = max(n(hw) − D, 0) / n(h·) + D · types(h·) / n(h·) · p(w | h without its first token),
where types(h·) is the number of distinct tokens seen after h. Below the highest order, n is the number of distinct
tokens seen before an n-gram instead of the number of its occurrences (its continuation count). The discount is
D = n₁ / (n₁ + 2 n₂) (Ney, Essen and Kneser 1994), n₁ and n₂ being the numbers of n-grams with count 1 and 2, plus ½
each, so that D is neither 0 nor 1 where one of them is missing. The unigram model is interpolated with the uniform
distribution over the ids 0 … max.
"""

import numpy as np


def unigram_loss(train: np.ndarray, val: np.ndarray) -> float:
    """Return the mean of −ln p(token) over `val` for a unigram model counted on `train` (1-d arrays of ids)."""
    base = _base(train, val)
    probability = _interpolate(*np.unique(train, return_counts=True), val, base, np.full(len(val), 1 / base))
    return float(-np.log(probability).mean())


def trigram_loss(train: np.ndarray, val: np.ndarray) -> float:
    """Return the mean of −ln p(token | previous two tokens) over `val` for a trigram model counted on `train`.

    The arrays of ids are 1-d; the mean starts with the third token of `val`.
    """
    base = _base(train, val)
    trigrams, occurrences = np.unique(_trigrams(train, base), return_counts=True)
    bigrams, bigram_continuations = np.unique(trigrams % base**2, return_counts=True)
    unigrams, unigram_continuations = np.unique(bigrams % base, return_counts=True)

    queries = _trigrams(val, base)
    probability = np.full(len(queries), 1 / base)
    probability = _interpolate(unigrams, unigram_continuations, queries % base, base, probability)
    probability = _interpolate(bigrams, bigram_continuations, queries % base**2, base, probability)
    probability = _interpolate(trigrams, occurrences, queries, base, probability)
    return float(-np.log(probability).mean())


def _base(train: np.ndarray, val: np.ndarray) -> int:
    """Return the base of the numbers that encode n-grams, the vocabulary size.

    The ids are the digits: an n-gram's context is number // base, its last token number % base.
    """
    base = 1 + int(max(train.max(), val.max()))
    if base >= 2**21:
        raise ValueError(f"token ids up to {base - 1}: a trigram does not fit in 63 bits")
    return base


def _trigrams(ids: np.ndarray, base: int) -> np.ndarray:
    ids = ids.astype(np.int64)
    return (ids[:-2] * base + ids[1:-1]) * base + ids[2:]


def _interpolate(
    ngrams: np.ndarray, counts: np.ndarray, queries: np.ndarray, base: int, lower: np.ndarray
) -> np.ndarray:
    """Return the probability [Q] of each query, an encoded n-gram.

    ngrams, counts: the sorted n-grams [N] and their counts. lower: the lower order's probabilities [Q].
    """
    n1, n2 = np.sum(counts == 1) + 0.5, np.sum(counts == 2) + 0.5
    discount = n1 / (n1 + 2 * n2)
    contexts, first, types = np.unique(ngrams // base, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first)

    count = _look_up(ngrams, counts, queries)
    total = _look_up(contexts, totals, queries // base)
    followers = _look_up(contexts, types, queries // base)
    interpolated = (np.maximum(count - discount, 0) + discount * followers * lower) / np.maximum(total, 1)
    return np.where(total > 0, interpolated, lower)


def _look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return values[keys == query] for each query, 0 if there is no such key; `keys` are sorted."""
    index = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[index] == queries, values[index], 0)
