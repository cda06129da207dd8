"""Sequences of sampled answers with their rewards, for `grpo.PolicyGradient`.

sequences of the batch    0  1  2  3  4  5  6  7       G = 4 answers to each prompt
sequence of the data      0  0  0  0  1  1  1  1
"""

from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import Tokenizer

from fira.data.rows import Rows
from fira.errors import UserError
from fira.nn.cross_entropy import IGNORE_INDEX
from fira.posttraining.answer_sampler import AnswerSampler
from fira.posttraining.exact_answer import final_answer, same_answer
from fira.posttraining.grpo import advantages
from fira.posttraining.prompted_answers import packed, prompted_answers

Reward = Callable[[list[int], list[int]], float]  # (a sampled answer, that of the data) → its reward


class ExactReward:
    """1 for an answer with the final answer of that in the data, else 0. after: the marker, see `exact_answer`."""

    def __init__(self, tokenizer: Tokenizer, after: str | None) -> None:
        self._tokenizer, self._after = tokenizer, after

    def __call__(self, answer: list[int], reference: list[int]) -> float:
        """The reward of an answer; both are tokens. Raises UserError if the reference has no final answer."""
        generated, expected = self._tokenizer.decode_batch([answer, reference], skip_special_tokens=True)
        if final_answer(expected, self._after) is None:
            raise UserError(
                f"--answer-after {self._after!r}: the answer {expected!r:.80} of the data does not contain it"
            )
        return float(same_answer(generated, expected, self._after))


class RewardedAnswers:
    """Replaces the answers by sampled ones, and stores their rewards. group: successive sequences of equal prompts."""

    def __init__(self, sampler: AnswerSampler, reward: Reward, group: int) -> None:
        self._sampler, self._reward, self._group = sampler, reward, group

    def __call__(self, rows: Rows, first: int) -> Rows:
        """See `derived_batches.Change` (collective)."""
        references = prompted_answers(rows)
        sampled = self._sampler.sampled(references, first)
        rewards = [
            np.array([self._reward(new.answer, old.answer) for new, old in zip(*documents, strict=True)])
            for documents in zip(sampled, references, strict=True)
        ]
        gains = [
            gain
            for start in range(0, len(rewards), self._group)
            for gain in advantages(np.stack(rewards[start : start + self._group]))
        ]
        new = packed(sampled, rows.tokens.shape[1])
        return new._replace(
            stored={
                "weights": _at_answers(new, [[1 / len(d.answer) for d in sequence] for sequence in sampled]),
                "advantages": _at_answers(new, gains),
                "answers": np.array([len(reward) for reward in rewards], np.float64),
                "wrong": np.array([len(reward) - reward.sum() for reward in rewards], np.float64),
            }
        )


def _at_answers(rows: Rows, values: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """float64 [B, T]: at each trained target the value of its document, from `values` by sequence and document."""
    assert rows.documents is not None
    result = np.zeros(rows.tokens.shape)
    for row, by_document in enumerate(values):
        trained = rows.targets[row] != IGNORE_INDEX
        result[row, trained] = np.asarray(by_document)[rows.documents[row, trained]]
    return result
