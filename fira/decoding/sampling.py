"""Options of sampling. This module does not import torch, so that the flags of commands can be parsed without it."""

from dataclasses import dataclass, fields

from fira.value_types import ClosedShare, NotNegative, OpenShare, PresencePenalty, RepetitionPenalty, Seed, Share, check

LEAST_TEMPERATURE = 1e-30  # a quotient of smaller numbers may overflow in fp32


@dataclass(frozen=True)
class Sampling:
    """Sampling options, which are applied in the order of the fields. The defaults have no effect.

    repetition_penalty: divisor of the logits of tokens that occur in the text; negative logits are multiplied by it
    (Keskar et al. 2019, arXiv 1909.05858).
    presence_penalty: subtracted from the logits of tokens that occur in the text.
    no_repeat_ngram: no sequence of this many tokens occurs twice.
    temperature: divisor of the logits; 0, and all numbers below LEAST_TEMPERATURE, select the most probable token.
    top_k: keep the k most probable tokens.
    top_p: keep the smallest set of most probable tokens whose total probability reaches p (Holtzman et al. 2019,
    arXiv 1904.09751).
    min_p: keep tokens whose probability is at least p times that of the most probable token.
    typical_p: keep the tokens whose surprisal is closest to the entropy, up to a total probability of p (Meister et al.
    2022, arXiv 2202.00666).
    seed: makes the text reproducible. Row i of a batch equals a single text with seed + i.

    Raises UserError for values out of range.
    """

    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: PresencePenalty = 0.0
    no_repeat_ngram: int | None = None
    temperature: NotNegative = 1.0
    top_k: int | None = None
    top_p: Share | None = None
    min_p: ClosedShare | None = None
    typical_p: OpenShare | None = None
    seed: Seed | None = None

    def __post_init__(self) -> None:
        for option in fields(self):
            check(option.name, getattr(self, option.name), option.type)
