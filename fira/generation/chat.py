"""A conversation: turns marked by the tokenizer's special tokens, the oldest forgotten when the context is full."""

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
    """`<|prompter|>question</s><|assistant|>answer</s>`, again and again."""

    def __init__(self, model: LanguageModel) -> None:
        tokenizer = Tokenizer.from_str(own_tokenizer(model).to_str())
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if not {PROMPTER, ASSISTANT} <= vocabulary.keys():
            raise UserError(f"the tokenizer has no {PROMPTER} and {ASSISTANT}; chat needs a model that knows them")
        self._prompter, self._assistant, self._eos = vocabulary[PROMPTER], vocabulary[ASSISTANT], eos_id(tokenizer)
        self._model, self._tokenizer = model, tokenizer
        self._tokenizer.encode_special_tokens = True  # who types the name of a mark has not ended a turn
        self._turns: list[list[int]] = []  # a question and its answer each

    def reset(self) -> None:
        self._turns = []

    def ask(self, question: str, max_new_tokens: int, stop: Sequence[str] = (), **sampling: Any) -> Iterator[str]:
        """The answer, piece by piece. What was heard of it is remembered, even if no more is asked for.

        The oldest turns are forgotten where question and answer would not fit the context with them; of a question
        that does not fit by itself the model sees the end. sampling: as for `continue_text`.
        """
        asked = [self._prompter, *self._encode(question), self._eos, self._assistant]
        room = self._model.config.seq_len - min(max_new_tokens, self._model.config.seq_len // 2)
        while self._turns and sum(map(len, self._turns)) + len(asked) > room:
            self._turns.pop(0)
        prompt, answer = [*chain(*self._turns), *asked], ""
        try:
            for piece in continue_text(self._model, prompt, max_new_tokens, [*stop, PROMPTER], **sampling):
                answer += piece
                yield piece
        finally:
            self._turns.append([*asked, *self._encode(answer), self._eos])

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids
