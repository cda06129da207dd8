"""Chat: turns delimited by special tokens; the oldest turns are dropped when the context is full.

<|prompter|>question</s><|assistant|>answer</s><|prompter|>question</s><|assistant|>…
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

from fira.checkpoint.load_model import own_tokenizer
from fira.data.tokenizer import ASSISTANT, PROMPTER, eos_id
from fira.errors import UserError
from fira.generation.text import continue_text
from fira.models.language_model import LanguageModel


class Conversation:
    """The turns of a chat with a model. Raises UserError if the tokenizer lacks the special tokens."""

    def __init__(self, model: LanguageModel) -> None:
        tokenizer = Tokenizer.from_str(own_tokenizer(model).to_str())
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if not {PROMPTER, ASSISTANT} <= vocabulary.keys():
            raise UserError(f"the tokenizer has no {PROMPTER} and {ASSISTANT}; give a model that was trained with them")
        self._prompter, self._assistant, self._eos = vocabulary[PROMPTER], vocabulary[ASSISTANT], eos_id(tokenizer)
        self._model, self._tokenizer = model, tokenizer
        self._tokenizer.encode_special_tokens = True  # a special token's name in a question is plain text
        self._turns: list[list[int]] = []  # the tokens of a question and its answer

    def reset(self) -> None:
        self._turns = []

    def ask(self, question: str, max_new_tokens: int, stop: Sequence[str] = (), **sampling: Any) -> Iterator[str]:
        """Yield the answer in pieces. The pieces yielded before the iterator is closed become part of the chat.

        The oldest turns are dropped if they do not fit into the context together with the question and the answer. If
        the question is longer than the context, the model reads its end. sampling: as for `continue_text`.
        """
        request = [self._prompter, *self._encode(question), self._eos, self._assistant]
        room = self._model.config.seq_len - min(max_new_tokens, self._model.config.seq_len // 2)
        while self._turns and sum(map(len, self._turns)) + len(request) > room:
            self._turns.pop(0)
        prompt, answer = [*chain(*self._turns), *request], ""
        try:
            for piece in continue_text(self._model, prompt, max_new_tokens, [*stop, PROMPTER], **sampling):
                answer += piece
                yield piece
        finally:
            self._turns.append([*request, *self._encode(answer), self._eos])

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids
