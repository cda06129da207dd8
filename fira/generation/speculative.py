"""Speculative decoding (Leviathan et al. 2022, arXiv 2211.17192): a draft model proposes, the target model verifies.

    q   [V] distribution of the draft model, from which a proposed token x is drawn
    p   [V] distribution of the target model at the same position; one forward pass computes it for all proposals

A proposal x is accepted with probability min(1, p(x) / q(x)); the first rejected one is replaced by a sample from
max(p − q, 0), normalised. Every token therefore has the distribution p for any draft model, which determines only the
number of accepted proposals.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fira.decoding.decoding import Reader, check_prompt
from fira.decoding.sampler import Sampler, draw, make_generators
from fira.decoding.sampling import Sampling
from fira.errors import UserError
from fira.models.language_model import LanguageModel

AHEAD = 4  # number of proposals per forward pass of the target model


@torch.inference_mode()
def speculate(
    model: LanguageModel,
    draft: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    eos: int | None = None,
    ahead: int = AHEAD,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, with the same distribution as `continuation`.

    draft: a model with the same vocabulary. Raises UserError if it differs, or where a model has a recurrent state.
    """
    if draft.config.vocab_size != model.config.vocab_size:
        sizes = f"{draft.config.vocab_size} and {model.config.vocab_size}"
        raise UserError(
            f"draft and model have different vocabularies ({sizes} tokens); give a draft with the same vocabulary"
        )
    check_prompt(model, prompt)
    target, proposer = Reader(model), Reader(draft)
    device = next(model.parameters()).device
    sampler, generators = Sampler(sampling), make_generators(sampling, 1, device)
    text, end = list(prompt), len(prompt) + max_new_tokens
    while len(text) < end:
        room = min(end - 1, target.seq_len, proposer.seq_len) - len(text)  # positions that remain in the caches
        proposals, draft_probabilities = _propose(proposer, text, min(ahead, max(0, room)), sampler, generators)
        tokens = torch.tensor([text + proposals], device=device)
        logits = target.logits(tokens, 1 + len(proposals))[0]
        new = _verify(tokens, proposals, draft_probabilities, logits, sampler, generators)
        for reader in (target, proposer):
            reader.keep(len(text) + len(new) - 1)  # neither model has read the last new token
        for token in new:
            text.append(token)
            yield token
            if token == eos:
                return


def _propose(
    reader: Reader, text: list[int], count: int, sampler: Sampler, generators: list[torch.Generator] | None
) -> tuple[list[int], list[Tensor]]:
    """Return the next `count` tokens of the draft model and the distributions q [V] from which they were drawn."""
    proposals: list[int] = []
    draft_probabilities: list[Tensor] = []
    for _ in range(count):
        tokens = torch.tensor([text + proposals], device=next(reader.model.parameters()).device)
        draft_probabilities.append(sampler.probabilities(tokens, reader.logits(tokens)[:, -1])[0])
        proposals.append(_draw(draft_probabilities[-1], generators))
    return proposals, draft_probabilities


def _verify(
    tokens: Tensor,
    proposals: list[int],
    draft_probabilities: list[Tensor],
    logits: Tensor,
    sampler: Sampler,
    generators: list[torch.Generator] | None,
) -> list[int]:
    """Return the accepted proposals and one further token.

    tokens: [1, T], ending with the proposals. logits: [proposals + 1, V], of the target model.
    """
    known = tokens.shape[1] - len(proposals)
    for i, (x, q) in enumerate(zip(proposals, draft_probabilities, strict=True)):
        p = sampler.probabilities(tokens[:, : known + i], logits[i : i + 1])[0]
        q = q.to(p.device)
        if torch.rand((), generator=generators[0] if generators else None, device=p.device) * q[x] >= p[x]:
            return [*proposals[:i], _draw((p - q).clamp(min=0), generators)]
    return [*proposals, _draw(sampler.probabilities(tokens, logits[-1:])[0], generators)]


def _draw(probabilities: Tensor, generators: list[torch.Generator] | None) -> int:
    """Draw a token from unnormalised probabilities [V]."""
    return int(draw(probabilities[None], generators))
