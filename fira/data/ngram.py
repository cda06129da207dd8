"""What counting alone achieves: the loss of unigram and trigram models, in nats per token.

Interpolated Kneser–Ney (Kneser and Ney 1995; Chen and Goodman 1998, section 3). For a context h of n(h·) tokens,
    p(w | h) = max(n(hw) − D, 0) / n(h·) + D · kinds(h·) / n(h·) · p(w | h without its first token),
with kinds(h·) the number of different tokens seen after h. Below the highest order, n counts the different tokens seen
before an n-gram instead of its occurrences. D = n₁ / (n₁ + 2 n₂) (Ney, Essen and Kneser 1994), n₁ and n₂ the number
of n-grams counted once and twice, here with ½ added to both, so that D is neither 0 nor 1 where one of them is missing.
Under the lowest order lies the uniform distribution over the ids 0 … greatest seen.
"""

import numpy as np


def unigram_loss(train: np.ndarray, val: np.ndarray) -> float:
    """Mean −ln p(token) over `val`, for a model of single tokens counted on `train` (1-d id arrays)."""
    base = _base(train, val)
    probability = _interpolate(*np.unique(train, return_counts=True), val, base, np.full(len(val), 1 / base))
    return float(-np.log(probability).mean())


def trigram_loss(train: np.ndarray, val: np.ndarray) -> float:
    """Mean −ln p(token | the two before) over `val` from its third token on, counted on `train` (1-d id arrays)."""
    base = _base(train, val)
    trigrams, occurrences = np.unique(_trigrams(train, base), return_counts=True)
    bigrams, kinds_before_bigram = np.unique(trigrams % base**2, return_counts=True)
    unigrams, kinds_before_unigram = np.unique(bigrams % base, return_counts=True)

    queries = _trigrams(val, base)
    probability = np.full(len(queries), 1 / base)
    probability = _interpolate(unigrams, kinds_before_unigram, queries % base, base, probability)
    probability = _interpolate(bigrams, kinds_before_bigram, queries % base**2, base, probability)
    probability = _interpolate(trigrams, occurrences, queries, base, probability)
    return float(-np.log(probability).mean())


def _base(train: np.ndarray, val: np.ndarray) -> int:
    """Ids are the digits of an n-gram's number: its context is number // base, its last token number % base."""
    base = 1 + int(max(train.max(), val.max()))
    if base >= 2**21:
        raise ValueError(f"token ids up to {base - 1}: three do not fit in 63 bits")
    return base


def _trigrams(ids: np.ndarray, base: int) -> np.ndarray:
    ids = ids.astype(np.int64)
    return (ids[:-2] * base + ids[1:-1]) * base + ids[2:]


def _interpolate(
    ngrams: np.ndarray, counts: np.ndarray, queries: np.ndarray, base: int, lower: np.ndarray
) -> np.ndarray:
    """p of each query (an n-gram's number), given the sorted n-grams counted and the order below's p for it."""
    once, twice = np.sum(counts == 1) + 0.5, np.sum(counts == 2) + 0.5
    discount = once / (once + 2 * twice)
    contexts, first, kinds = np.unique(ngrams // base, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first)

    count = _look_up(ngrams, counts, queries)
    total = _look_up(contexts, totals, queries // base)
    kind = _look_up(contexts, kinds, queries // base)
    seen = (np.maximum(count - discount, 0) + discount * kind * lower) / np.maximum(total, 1)
    return np.where(total > 0, seen, lower)


def _look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """values[keys == query], 0 where there is no such key; `keys` are sorted."""
    place = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[place] == queries, values[place], 0)
