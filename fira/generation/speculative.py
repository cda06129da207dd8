"""Speculative decoding (Leviathan et al. 2022, arXiv 2211.17192): a small model guesses, the large one checks.

The large model reads several guessed tokens at once. A guess x of the draft's distribution q is taken with probability
min(1, p(x) / q(x)), p being the large model's; the first that is not taken is replaced by a draw from max(p − q, 0). So
every token has the distribution p, whatever the draft, which decides only how many of its guesses are taken.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fira.decoding.decoding import Reader, check_prompt
from fira.decoding.sampling import Sampler, Sampling, draw
from fira.errors import UserError
from fira.models.language_model import LanguageModel

AHEAD = 4  # tokens guessed at a time


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
    """The tokens that follow a prompt, distributed as the model's own `continuation` of it.

    draft: a model of the same vocabulary. UserError where it is not, or where either has a recurrent state.
    """
    if draft.config.vocab_size != model.config.vocab_size:
        sizes = f"{draft.config.vocab_size} and {model.config.vocab_size}"
        raise UserError(f"draft and model have different vocabularies ({sizes} tokens); give a draft of the same")
    check_prompt(model, prompt)
    target, guesser = Reader(model), Reader(draft)
    device = next(model.parameters()).device
    sampler, generators = Sampler(sampling), sampling.generators(1, device)
    text, end = list(prompt), len(prompt) + max_new_tokens
    while len(text) < end:
        room = min(end - 1, target.seq_len, guesser.seq_len) - len(text)  # beyond its context a model has no cache
        guesses, chances = _guess(guesser, text, min(ahead, max(0, room)), sampler, generators)
        tokens = torch.tensor([text + guesses], device=device)
        logits = target.logits(tokens, 1 + len(guesses))[0]
        new = _check(tokens, guesses, chances, logits, sampler, generators)
        for reader in (target, guesser):
            reader.keep(len(text) + len(new) - 1)  # the last new token was read by neither
        for token in new:
            text.append(token)
            yield token
            if token == eos:
                return


def _guess(
    reader: Reader, text: list[int], count: int, sampler: Sampler, generators: list[torch.Generator] | None
) -> tuple[list[int], list[Tensor]]:
    """The draft's next `count` tokens, each with the distribution [V] that it was drawn from."""
    guesses: list[int] = []
    chances: list[Tensor] = []
    for _ in range(count):
        tokens = torch.tensor([text + guesses], device=next(reader.model.parameters()).device)
        chances.append(sampler.probabilities(tokens, reader.logits(tokens)[:, -1])[0])
        guesses.append(_draw(chances[-1], generators))
    return guesses, chances


def _check(
    tokens: Tensor,
    guesses: list[int],
    chances: list[Tensor],
    logits: Tensor,
    sampler: Sampler,
    generators: list[torch.Generator] | None,
) -> list[int]:
    """The guesses that are taken, and one token more. tokens: [1, T], they are the last. logits: [guesses + 1, V]."""
    known = tokens.shape[1] - len(guesses)
    for place, (guess, q) in enumerate(zip(guesses, chances, strict=True)):
        p = sampler.probabilities(tokens[:, : known + place], logits[place : place + 1])[0]
        q = q.to(p.device)
        if torch.rand((), generator=generators[0] if generators else None, device=p.device) * q[guess] >= p[guess]:
            return [*guesses[:place], _draw((p - q).clamp(min=0), generators)]
    return [*guesses, _draw(sampler.probabilities(tokens, logits[-1:])[0], generators)]


def _draw(probabilities: Tensor, generators: list[torch.Generator] | None) -> int:
    """A token by its weight in [V]."""
    return int(draw(probabilities[None], generators))
