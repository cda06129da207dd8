"""Chats as token ids: messages are rendered by a Jinja template as in transformers' `apply_chat_template`.

    messages   [{"role": "user", "content": "Is </s> a token?"}, {"role": "assistant", "content": "Yes"}]
    rendered   <|prompter|>Is ⟨</s>⟩ a token?</s><|assistant|>⟦Yes</s>⟧
    pieces     "<|prompter|>Is "   "</s>"   " a token?</s><|assistant|>"   "Yes</s>"
    literal                         yes
    answer                                                                  0

⟦ ⟧ enclose a block `{% generation %}` of the template, and ⟨ ⟩ the name of a special token inside a message, which is
encoded as text. The pieces are encoded one by one. The ids are those of `apply_chat_template` with
`sanitize_control_tokens=True`, and the mask is that of `return_assistant_tokens_mask=True`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fira.data.pieces import encode_documents
from fira.data.tokenizer import ASSISTANT, PROMPTER
from fira.data.tokenizer_config import TokenizerConfig
from fira.errors import UserError

# Noncharacters of Unicode, which are not interchanged as text; they are removed from messages.
ANSWER_BEGIN, ANSWER_END, LITERAL_BEGIN, LITERAL_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARKERS = re.compile("([\ufdd0-\ufdd3])")
BATCH = 1000  # chats encoded together

Message = dict[str, Any]  # with a role, and with its content as text


@dataclass(frozen=True)
class Chat:
    """Messages to train on.

    context: number of answers at the beginning that are context only, and not trained. tools: for the template.
    where: place in the data, for error messages.
    """

    messages: Sequence[Message]
    context: int = 0
    tools: Sequence[Any] | None = None
    where: str = "the chat"


@dataclass(frozen=True)
class EncodedChat:
    """ids: uint32 [T]. answers: bool [T], the tokens of answers and of their ends. where: as in Chat.

    trained: bool [T], the same without the answers that are context.
    """

    ids: np.ndarray
    answers: np.ndarray
    trained: np.ndarray
    where: str


@dataclass(frozen=True)
class Piece:
    """Part of a rendered chat. literal: encode special tokens as text. answer: the number of the answer, or None."""

    text: str
    literal: bool
    answer: int | None


class ChatTemplate:
    """Encodes chats. Raises UserError if the tokenizer has no valid chat template."""

    def __init__(self, tokenizer: Tokenizer, config: TokenizerConfig) -> None:
        if config.chat_template is None:
            raise UserError(
                f"the tokenizer has no chat template, and no tokens {PROMPTER} and {ASSISTANT}; "
                "give a model whose tokenizer has them"
            )
        from fira.data.jinja_template import JinjaTemplate  # here, because only chats require jinja2

        self._template = JinjaTemplate(config.chat_template, (ANSWER_BEGIN, ANSWER_END))
        self._variables = {
            name: value
            for name in ("eos_token", "bos_token", "unk_token")
            if (value := getattr(config, name)) is not None
        }
        self._tokenizer = tokenizer
        self._literal = Tokenizer.from_str(tokenizer.to_str())
        self._literal.encode_special_tokens = True
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(self, chats: Iterable[Chat]) -> Iterator[EncodedChat]:
        """Yield the tokens of each chat. Raises UserError, which names the place of the chat, if it has no answer."""
        remaining = iter(chats)
        while batch := list(islice(remaining, BATCH)):
            rendered = [[*_pieces(self._render(chat))] for chat in batch]
            for chat, pieces, ids in zip(batch, rendered, self._encode(rendered), strict=True):
                numbers = [-1 if piece.answer is None else piece.answer for piece in pieces]
                answer = np.repeat(numbers, [len(part) for part in ids])
                answers, trained = answer >= 0, answer >= chat.context
                if not trained.any():
                    raise UserError(
                        f"{chat.where}: the chat template marks no answer; put it into "
                        "{% generation %} … {% endgeneration %}"
                    )
                yield EncodedChat(np.concatenate(ids, dtype=np.uint32), answers, trained, chat.where)

    def prompt(self, messages: Sequence[Message], where: str = "the chat") -> list[int]:
        """Return the tokens that the model continues with its answer to the messages. where: their place."""
        rendered = self._render(Chat(messages, where=where), add_generation_prompt=True)
        (ids,) = self._encode([[*_pieces(rendered)]])
        return [token for part in ids for token in part]

    def _render(self, chat: Chat, add_generation_prompt: bool = False) -> str:
        """Return the rendered chat with markers."""
        try:
            messages, tools = self._marked(chat.messages), self._marked(chat.tools)
        except RecursionError:
            raise UserError(f"{chat.where}: a message is nested too deeply; correct it") from None
        variables = {"messages": messages, "tools": tools, "documents": None, **self._variables}
        return self._template.render({**variables, "add_generation_prompt": add_generation_prompt}, chat.where)

    def _marked(self, value: Any) -> Any:
        """Return a JSON value with markers around the names of special tokens in its texts."""
        if isinstance(value, str):
            return self._special.sub(rf"{LITERAL_BEGIN}\g<0>{LITERAL_END}", MARKERS.sub("", value))
        if isinstance(value, dict):
            return {key: self._marked(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(entry) for entry in value]
        return value

    def _encode(self, chats: Sequence[Sequence[Piece]]) -> list[list[Sequence[int]]]:
        """Return the ids of each piece of each chat."""
        encoded = {}
        for literal, tokenizer in ((False, self._tokenizer), (True, self._literal)):
            texts = [piece.text for pieces in chats for piece in pieces if piece.literal is literal]
            encoded[literal] = iter([ids for _, ids in encode_documents(tokenizer, texts)])
        return [[next(encoded[piece.literal]) for piece in pieces] for pieces in chats]


def _pieces(rendered: str) -> Iterator[Piece]:
    literal, inside, answers = False, False, 0
    for part in MARKERS.split(rendered):
        if part in (LITERAL_BEGIN, LITERAL_END):
            literal = part == LITERAL_BEGIN
        elif part in (ANSWER_BEGIN, ANSWER_END):
            inside = part == ANSWER_BEGIN
            answers += not inside
        elif part:
            yield Piece(part, literal, answers if inside else None)
