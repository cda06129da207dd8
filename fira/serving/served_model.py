"""The model of a server, and the texts that a request asks it for."""

from asyncio import Queue
from collections.abc import Sequence

from fira.checkpoint.load_model import own_config, own_tokenizer
from fira.data.chat_template import ChatTemplate
from fira.data.tokenizer import PROMPTER, eos_id
from fira.decoding.decoding import check_prompt
from fira.errors import UserError
from fira.generation.conversation import own_template
from fira.generation.text import encode
from fira.models.language_model import LanguageModel
from fira.serving.api_errors import APIError
from fira.serving.api_requests import ChatRequest, CompletionRequest, GenerationRequest
from fira.serving.choice import Choice, Event
from fira.serving.row_sampling import RowSampler

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions


class ServedModel:
    """A model with its name in the API. most: largest number of texts in a request.

    Raises UserError if it has no tokenizer.
    """

    def __init__(self, model: LanguageModel, name: str, most: int) -> None:
        self.name, self.most = name, most
        self.context: int = model.config.seq_len
        self._model, self._tokenizer = model, own_tokenizer(model)
        self._device = next(model.parameters()).device
        self._ends = [PROMPTER, own_config(model).eos_token or ""]  # generated instead of the tokenizer's EOS
        self._template: ChatTemplate | None = None
        try:
            self._template = own_template(model)
        except UserError as error:
            self._no_template = str(error)

    @property
    def has_chat(self) -> bool:
        return self._template is not None

    def check_name(self, name: str | None) -> None:
        """Raise APIError if a request names another model."""
        if name is not None and name != self.name:
            raise APIError(404, f"the model {name!r} does not exist; use {self.name!r}", "model", "model_not_found")

    def chat_choices(self, request: ChatRequest) -> list[Choice]:
        """The answers to a chat. Raises APIError or UserError for an invalid request."""
        self.check_name(request.model)
        if self._template is None:
            raise APIError(400, self._no_template, "messages")
        prompt = self._template.prompt([message.as_message() for message in request.messages], "messages")
        limit = request.max_completion_tokens or request.max_tokens
        return self._choices(request, [prompt], limit, [*request.stop, *self._ends], "messages")

    def completion_choices(self, request: CompletionRequest) -> list[Choice]:
        """The continuations of prompts. Raises APIError or UserError for an invalid request."""
        self.check_name(request.model)
        prompts = [
            (encode(prompt, self._tokenizer) if isinstance(prompt, str) else prompt) or [eos_id(self._tokenizer)]
            for prompt in request.prompts()
        ]
        return self._choices(request, prompts, request.max_tokens or COMPLETION_TOKENS, request.stop, "prompt")

    def _choices(
        self,
        request: GenerationRequest,
        prompts: Sequence[list[int]],
        limit: int | None,
        stop: Sequence[str],
        field: str,
    ) -> list[Choice]:
        """`n` choices of each prompt. field: that of the prompts, for error messages."""
        n = request.n or 1
        if not 1 <= n * len(prompts) <= self.most:
            message = f"{n * len(prompts)} texts in a request; give at least 1 and at most {self.most}"
            raise APIError(400, message, "n" if n > 1 else field)
        events: Queue[Event] = Queue()
        choices: list[Choice] = []
        for prompt in prompts:
            check_prompt(self._model, prompt)
            if len(prompt) > self.context:
                message = f"{len(prompt)} tokens are more than the model's context of {self.context}; shorten them"
                raise APIError(400, message, field, "context_length_exceeded")
            room = self.context - len(prompt) + 1  # the last token of a text is not read
            for number in range(n):
                choices.append(
                    Choice(
                        index=len(choices),
                        prompt=prompt,
                        sampler=RowSampler(request.sampling(number), self._device),
                        limit=min(limit or room, room),
                        stop=stop,
                        tokenizer=self._tokenizer,
                        events=events,
                        count_experts=request.return_experts,
                    )
                )
        return choices
