"""Distillation on answers of the student (Agarwal et al. 2024, arXiv 2306.13649)."""

from fira.data.rows import Rows
from fira.parallel.batch_split import hashed
from fira.posttraining.answer_sampler import AnswerSampler
from fira.posttraining.prompted_answers import packed, prompted_answers


class OnPolicyAnswers:
    """Replaces the answers in a share of the sequences by those that the student samples.

    Whether a sequence is one of them is a function of its number and of the seed.
    """

    def __init__(self, sampler: AnswerSampler, share: float, seed: int) -> None:
        self._sampler, self._share, self._seed = sampler, share, seed

    def __call__(self, rows: Rows, first: int) -> Rows:
        """See `derived_batches.Change` (collective)."""
        chosen = [row for row in range(len(rows.tokens)) if self._is_chosen(first + row)]
        assert rows.documents is not None
        tokens, targets, documents = rows.tokens.copy(), rows.targets.copy(), rows.documents.copy()
        sequences = prompted_answers(Rows(tokens[chosen], targets[chosen], documents[chosen]))
        sampled = packed(self._sampler.sampled(sequences, first), tokens.shape[1])
        tokens[chosen], targets[chosen], documents[chosen] = sampled.tokens, sampled.targets, sampled.documents
        return Rows(tokens, targets, documents)

    def _is_chosen(self, number: int) -> bool:
        return hashed(f"on-policy/{self._seed}/{number}") < self._share * 2**62
