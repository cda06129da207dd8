"""One of the texts that a request asks for: its prompt, its end, and the pieces of text that a client receives."""

from asyncio import Queue
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from fira.data.tokenizer import eos_id
from fira.generation.text import TextStream
from fira.serving.row_sampling import RowSampler
from fira.serving.running_batch import Text


@dataclass(frozen=True)
class Event:
    """A further piece of a text. finish: "stop" or "length" with the last one. error: why the text has no end."""

    index: int
    piece: str = ""
    finish: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Choice:
    """A text that the model generates for a request.

    index: number of the choice in its request. limit: number of tokens to generate. stop: the text ends before these.
    events: receives the pieces, in the thread of the event loop. count_experts: whether `text.experts` is filled.
    cancelled: set by any thread when the client no longer waits.
    """

    index: int
    prompt: list[int]
    sampler: RowSampler
    limit: int
    stop: Sequence[str]
    tokenizer: Tokenizer
    events: Queue[Event]
    count_experts: bool = False
    cancelled: bool = field(default=False, init=False)
    finish: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.text = Text(list(self.prompt), self.sampler, {} if self.count_experts else None)
        self._stream = TextStream(self.tokenizer, self.prompt, self.stop)
        self._eos = eos_id(self.tokenizer)

    @property
    def generated(self) -> int:
        """Number of generated tokens, a final EOS included."""
        return len(self.text.tokens) - len(self.prompt)

    def add(self, token: int) -> Event:
        """Return the text that is final after a token: complete characters that cannot begin a text in `stop`."""
        piece = "" if token == self._eos else self._stream.add(token)
        if token == self._eos or self._stream.stopped:
            self.finish = "stop"
        elif self.generated == self.limit:
            self.finish = "length"
        if self.finish:
            piece += self._stream.pending
        return Event(self.index, piece, self.finish)
