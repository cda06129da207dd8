"""Tokens of requests, with the conventions of `HFLM` of lm-eval.

context       c₀ c₁ c₂        continuation  t₀ t₁
inputs        c₀ c₁ c₂ t₀     targets       – – t₀ t₁

- Context and continuation are encoded together. The tokens of the context alone are counted; those after them belong to
  the continuation. Spaces at the end of the context are moved to the continuation.
- An empty context is the BOS token, or EOS if there is no BOS.
- A conversation is rendered with the chat template, up to the beginning of the answer. This is not one of lm-eval's.
- If there are more inputs than the model's context, the first tokens are removed. A prompt leaves room for its answer.
"""

from functools import cached_property
from typing import NamedTuple

from tokenizers import Tokenizer

from fira.data.chat_template import ChatTemplate
from fira.data.tokenizer_config import TokenizerConfig
from fira.errors import UserError
from fira.evaluation.greedy_answers import EncodedPrompt
from fira.evaluation.task_forms import ExactAnswer, Request


class EncodedRequest(NamedTuple):
    """tokens: of context and continuation. scored: number of tokens of the continuation, the last ones."""

    tokens: list[int]
    scored: int
    truncated: bool


class RequestEncoder:
    """Encodes requests for a model with a context of `seq_len` tokens. config: special tokens of the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, config: TokenizerConfig, seq_len: int) -> None:
        name = config.bos_token or config.eos_token
        prefix = None if name is None else tokenizer.token_to_id(name)
        if prefix is None:
            raise UserError("the tokenizer has neither a BOS nor an EOS token; name one in tokenizer_config.json")
        self._tokenizer, self._config, self._prefix, self.seq_len = tokenizer, config, prefix, seq_len
        self._prefix_text = tokenizer.decode([prefix], skip_special_tokens=False)

    def request(self, request: Request, where: str) -> EncodedRequest:
        """Encode a request. Raises UserError if the continuation has no tokens, or more than the model's context."""
        context, continuation = self._pair(*request)
        if not continuation:
            raise UserError(f"{where}: {request.continuation!r:.40} has no token of its own; correct the record")
        if len(continuation) > self.seq_len:
            raise UserError(
                f"{where}: a continuation of {len(continuation)} tokens, the model's context is {self.seq_len}; "
                "shorten it"
            )
        tokens = context + continuation
        kept = tokens[-(self.seq_len + 1) :]
        return EncodedRequest(kept, len(continuation), len(kept) < len(tokens))

    def prompt(self, example: ExactAnswer, where: str) -> EncodedPrompt:
        """Encode a prompt, or a conversation with the chat template.

        Raises UserError if the answer may have as many tokens as the model's context, and for a conversation that the
        template refuses.
        """
        room = self.seq_len - example.max_tokens
        if room < 1:
            raise UserError(
                f"{where}: an answer of up to {example.max_tokens} tokens, the model's context is {self.seq_len}; "
                "give a smaller max_tokens in the record"
            )
        if isinstance(example.prompt, str):
            tokens = self._encode(example.prompt)
        else:
            tokens = self._template.prompt(example.prompt, where)
        return EncodedPrompt(tokens[-room:], example.stop, example.max_tokens, len(tokens) > room)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer, self._config)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context.strip():
            ids = self._tokenizer.encode(context + continuation, add_special_tokens=False).ids
            return (ids[:1], ids[1:]) if ids[:1] == [self._prefix] else ([self._prefix], ids)
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        whole, alone = self._encode(stripped + continuation), self._encode(stripped)
        return alone, whole[len(alone) :]

    def _encode(self, text: str) -> list[int]:
        """The ids of a text, after BOS if the tokenizer adds it, unless the text begins with it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not text.startswith(self._prefix_text)).ids
        return ids
