"""Summary of a corpus: the counts of its sources, their sums, and the loss of n-gram baselines."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fira.data.ngram import trigram_loss, unigram_loss
from fira.data.packed import PackedTokens, Source

BASELINE_TOKENS = 10_000_000  # training tokens for the n-gram baselines; a tenth of this for validation tokens

Summary = dict[str, Any]


def summarise(sources: Sequence[Source], summaries: list[Summary]) -> Summary:
    """Return the total counts, and the baselines on a sample with the sources in their proportions."""
    train = np.concatenate([_sample(s.train, int(s.weight * BASELINE_TOKENS)) for s in sources])
    val = np.concatenate([_sample(s.val, int(s.weight * BASELINE_TOKENS / 10)) for s in sources])
    summary = _total(summaries) | {"unigram": unigram_loss(train, val), "trigram": trigram_loss(train, val)}
    return summary | {"sources": summaries} if len(sources) > 1 else summary


def _total(summaries: list[Summary]) -> Summary:
    """Return the sums of the counts, None if a source has none, and tokens_per_word over all words."""
    columns = {name: [counts[name] for counts in summaries] for name in summaries[0]}
    total = {name: None if None in values else sum(values) for name, values in columns.items()}
    if total["words"] is not None:
        total["tokens_per_word"] = sum(np.multiply(columns["words"], columns["tokens_per_word"])) / total["words"]
    return total


def _sample(tokens: PackedTokens, limit: int, pieces: int = 16) -> np.ndarray:
    """Return all tokens, or `limit` of them in evenly spread pieces."""
    if len(tokens) <= limit:
        return tokens.read(0, len(tokens))
    starts = [piece * len(tokens) // pieces for piece in range(pieces)]
    return np.concatenate([tokens.read(start, start + limit // pieces) for start in starts])
