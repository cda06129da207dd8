"""The thread that runs the model: it admits waiting texts to the running batch and decodes one token after another.

event loop   submit ──→ waiting ──→ prompt read in pieces ──→ running batch ──→ finished
                ↑                                                 │
                └──────────────── events of each step ←───────────┘
"""

import logging
import threading
import time
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Sequence

from fira.decoding.sampling import Sampling
from fira.models.language_model import LanguageModel
from fira.serving.choice import Choice, Event
from fira.serving.row_sampling import RowSampler
from fira.serving.running_batch import RunningBatch, Text

PROMPT_TOKENS = 256  # of prompts that are read between two steps of the running texts
SHUTTING_DOWN = "the server is shutting down"

logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """Raised for a request that does not fit into the queue."""


class ShuttingDownError(Exception):
    """Raised for a request after `drain`."""


class Scheduler:
    """Generates texts in a thread of its own.

    rows: number of texts in the running batch. queue: number of further texts that can wait.
    """

    def __init__(self, model: LanguageModel, rows: int, queue: int) -> None:
        self.rows, self.queue = rows, queue
        self._batch = RunningBatch(model, rows)
        self._waiting: deque[Choice] = deque()
        self._running: dict[Text, Choice] = {}
        self._events: list[tuple[Choice, Event]] = []
        self._changed = threading.Condition()
        self._deadline: float | None = None  # set by `drain`
        self._closed = False
        self._loop: AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def warm_up(self) -> int:
        """Decode two tokens, so that all memory is allocated. Return the bytes of the key-value cache."""
        text = Text([0], RowSampler(Sampling(temperature=0), self._batch.device))
        self._batch.read_prompt(text, 1)
        self._batch.join(text)
        self._batch.step()
        self._batch.leave(text)
        return self._batch.cache.nbytes()

    def start(self, loop: AbstractEventLoop) -> None:
        """Start the thread. Events are delivered in the thread of `loop`."""
        self._loop = loop
        self._thread.start()

    def submit(self, choices: Sequence[Choice]) -> None:
        """Generate the texts of a request. Raises QueueFullError or ShuttingDownError; then none is generated."""
        with self._changed:
            if self._deadline is not None:
                raise ShuttingDownError
            if sum(self.load()) + len(choices) > self.rows + self.queue:
                raise QueueFullError
            self._waiting.extend(choices)
            self._changed.notify()

    def load(self) -> tuple[int, int]:
        """Return the number of running and of waiting texts."""
        return len(self._running), len(self._waiting)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def drain(self, seconds: float) -> None:
        """Accept no further requests, and end the others with an error after a number of seconds.

        A further call can only shorten the time.
        """
        with self._changed:
            self._deadline = min(self._deadline or float("inf"), time.monotonic() + seconds)

    def close(self) -> None:
        """End the thread after its current step."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while self._wait():
            try:
                self._advance()
            except Exception:
                logger.exception("the model failed; all running requests end with an error")
                self._end_all("the model failed; see the log of the server")
            self._deliver()

    def _wait(self) -> bool:
        """Wait for work. Return False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
            return not self._closed

    def _advance(self) -> None:
        """Remove texts whose clients have left, read prompts, and decode one token of every running text."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._end_all(SHUTTING_DOWN)
        with self._changed:
            self._waiting = deque(choice for choice in self._waiting if not choice.cancelled)
        for text, choice in list(self._running.items()):
            if choice.cancelled:
                self._leave(text)
        self._admit()
        texts = list(self._batch.texts)
        for text, token in zip(texts, self._batch.step() if texts else [], strict=True):
            if self._add(self._running[text], token):
                self._leave(text)

    def _admit(self) -> None:
        """Read prompts of waiting texts up to PROMPT_TOKENS, so that the running texts do not wait for long."""
        remaining = PROMPT_TOKENS
        while remaining > 0 and self._waiting and len(self._running) < self.rows:
            if together := self._short_prompts(remaining):
                tokens = self._batch.read_prompts([choice.text for choice in together])
                remaining -= len(together) * max(len(choice.prompt) for choice in together)
            else:
                choice = self._waiting[0]
                before = choice.text.length_read
                token = self._batch.read_prompt(choice.text, remaining)
                if token is None:
                    return
                remaining -= choice.text.length_read - before
                together, tokens = [choice], [token]
            self._start(together, tokens)

    def _short_prompts(self, limit: int) -> list[Choice]:
        """The first waiting texts whose whole prompts, with padding to the longest, have at most `limit` tokens."""
        found: list[Choice] = []
        longest = 0
        with self._changed:
            for choice in self._waiting:
                longest = max(longest, len(choice.prompt))
                full = len(self._running) + len(found) == self.rows
                if full or choice.text.length_read or (len(found) + 1) * longest > limit:
                    break
                found.append(choice)
        return found

    def _start(self, choices: Sequence[Choice], tokens: Sequence[int]) -> None:
        """Add the first waiting texts to the running batch, with their first tokens."""
        for choice, token in zip(choices, tokens, strict=True):
            with self._changed:
                self._waiting.popleft()
            if not self._add(choice, token):
                self._batch.join(choice.text)
                self._running[choice.text] = choice

    def _add(self, choice: Choice, token: int) -> bool:
        """Send the text of a token. Return whether it is the last one."""
        self._events.append((choice, choice.add(token)))
        return choice.finish is not None

    def _leave(self, text: Text) -> None:
        self._batch.leave(text)
        del self._running[text]

    def _end_all(self, reason: str) -> None:
        """End all texts with an error, and begin with an empty batch."""
        with self._changed:
            choices = [*self._running.values(), *self._waiting]
            self._waiting.clear()
            self._running.clear()
        self._batch.clear()
        self._events += [(choice, Event(choice.index, error=reason)) for choice in choices]

    def _deliver(self) -> None:
        """Hand the events of a step to the event loop, all at once."""
        if self._events:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(_put_all, self._events)
            self._events = []


def _put_all(events: Sequence[tuple[Choice, Event]]) -> None:
    for choice, event in events:
        choice.events.put_nowait(event)
