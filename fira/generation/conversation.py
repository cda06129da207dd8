"""Chat: messages in the format of the model's chat template; the oldest are dropped when the context is full."""

from collections.abc import Iterator, Sequence
from typing import Any

from fira.checkpoint.load_model import own_config, own_tokenizer
from fira.data.chat_template import ChatTemplate, Message
from fira.data.tokenizer import PROMPTER
from fira.generation.text import continue_text
from fira.models.language_model import LanguageModel


def own_template(model: LanguageModel) -> ChatTemplate:
    """Return the model's chat template. Raises UserError if its tokenizer has none."""
    return ChatTemplate(own_tokenizer(model), own_config(model))


class Conversation:
    """The messages of a chat with a model. Raises UserError if the model has no chat template."""

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._template = model, own_template(model)
        self._ends = [PROMPTER, own_config(model).eos_token or ""]  # generated instead of the tokenizer's EOS
        self._messages: list[Message] = []  # question, answer, question, answer, …

    def reset(self) -> None:
        self._messages = []

    def ask(self, question: str, max_new_tokens: int, stop: Sequence[str] = (), **sampling: Any) -> Iterator[str]:
        """Yield the answer in pieces. The pieces yielded before the iterator is closed become part of the chat.

        The oldest turns are dropped if they do not fit into the context together with the question and the answer. If
        the question is longer than the context, the model reads its end. sampling: as for `continue_text`.
        """
        self._messages.append({"role": "user", "content": question})
        room = self._model.config.seq_len - min(max_new_tokens, self._model.config.seq_len // 2)
        while len(prompt := self._template.prompt(self._messages)) > room and len(self._messages) > 1:
            del self._messages[:2]
        answer = ""
        try:
            for piece in continue_text(self._model, prompt, max_new_tokens, [*stop, *self._ends], **sampling):
                answer += piece
                yield piece
        finally:
            self._messages.append({"role": "assistant", "content": answer})
