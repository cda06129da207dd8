"""Bodies of answers, whole or in chunks of a stream of server-sent events.

`experts` is not part of OpenAI's API. With `return_experts` it has, by layer number, how often each expert was chosen
for the tokens of the answer.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fira.serving.api_errors import APIError
from fira.serving.choice import Choice, Event

Body = dict[str, Any]


@dataclass
class Answer:
    """The texts that are generated for a request. chat: whether the request is a list of messages.

    usage_in_stream: whether a stream ends with the numbers of tokens.
    """

    model: str
    choices: Sequence[Choice]
    chat: bool
    usage_in_stream: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def events(self) -> AsyncIterator[Event]:
        """Yield the pieces of all texts in the order in which they are generated. Raises APIError if one fails."""
        unfinished = len(self.choices)
        while unfinished:
            event = await self.choices[0].events.get()
            if event.error:
                raise APIError(503, event.error)
            unfinished -= event.finish is not None
            yield event

    async def whole(self) -> Body:
        """Wait for all texts, and return the body of the answer."""
        texts, ends = [""] * len(self.choices), [""] * len(self.choices)
        async for event in self.events():
            texts[event.index] += event.piece
            ends[event.index] = event.finish or ""
        choices = [
            {"index": index, "finish_reason": end, "logprobs": None} | self._text(text)
            for index, (text, end) in enumerate(zip(texts, ends, strict=True))
        ]
        return self._body(choices, "chat.completion") | {"usage": self.usage()} | self._experts()

    async def stream(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events. An error during the answer is the last event."""
        try:
            if self.chat:
                for choice in self.choices:
                    yield self._chunk([self._part(choice.index, {"role": "assistant", "content": ""})])
            async for event in self.events():
                if event.piece or event.finish:
                    delta = {"content": event.piece} if event.piece else {}
                    yield self._chunk([self._part(event.index, delta, event.piece, event.finish)])
            if experts := self._experts():
                yield self._chunk([], experts)
            if self.usage_in_stream:
                yield self._chunk([], {"usage": self.usage()})
            yield "data: [DONE]\n\n"
        except APIError as error:
            yield _server_sent(error.body())

    def usage(self) -> dict[str, int]:
        """Numbers of tokens. A prompt with several answers counts once."""
        prompt = sum(len(ids) for ids in {id(choice.prompt): choice.prompt for choice in self.choices}.values())
        generated = sum(choice.generated for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def cancel(self) -> None:
        """Stop the texts that are not finished."""
        for choice in self.choices:
            choice.cancelled = True

    def _text(self, text: str) -> Body:
        return {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}

    def _part(self, index: int, delta: Body, piece: str = "", finish: str | None = None) -> Body:
        part = {"index": index, "finish_reason": finish, "logprobs": None}
        return part | ({"delta": delta} if self.chat else {"text": piece})

    def _chunk(self, choices: list[Body], more: Body | None = None) -> str:
        usage = {"usage": None} if self.usage_in_stream else {}
        return _server_sent(self._body(choices, "chat.completion.chunk") | usage | (more or {}))

    def _body(self, choices: list[Body], kind: str) -> Body:
        prefix, kind = ("chatcmpl", kind) if self.chat else ("cmpl", "text_completion")
        id_ = f"{prefix}-{self.id}"
        return {"id": id_, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _experts(self) -> Body:
        """The counts of all texts together, if they were requested and there are experts."""
        totals: dict[int, list[int]] = {}
        for choice in self.choices:
            for layer, counts in (choice.text.experts or {}).items():
                before = totals.get(layer, [0] * len(counts))
                totals[layer] = [a + b for a, b in zip(before, counts.tolist(), strict=True)]
        return {"experts": totals} if totals else {}


def _server_sent(body: Body) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
