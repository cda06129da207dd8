"""Bodies of requests. Fields that OpenAI's API does not have are those of `fira.decoding.sampling.Sampling`."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fira.decoding.sampling import Sampling
from fira.errors import UserError
from fira.serving.api_errors import APIError

# Fields of the API without a counterpart here, and values that have no effect.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
IGNORED = {  # fields for the operator of a service
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}


def _encodable(text: str) -> str:
    """Raise ValueError, a UnicodeEncodeError, for half of a surrogate pair, which JSON can contain."""
    text.encode()
    return text


UnicodeText = Annotated[str, AfterValidator(_encodable)]
Stops = Annotated[
    list[Annotated[UnicodeText, Field(min_length=1, max_length=1000)]],
    Field(max_length=4),
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop, json_schema_input_type=str | list[str]),
]
Count = Annotated[int, Field(ge=1)]


class _Body(BaseModel):
    """An object of which no other fields are accepted; null stands for a missing field."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # the pieces are not padded


class GenerationRequest(_Body):
    """Fields of both kinds of requests. return_experts: not in OpenAI's API, see `fira.serving.api_answers`."""

    model: str | None = None
    max_tokens: Count | None = None
    n: Count | None = None
    stop: Stops = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram: int | None = None
    seed: int | None = None
    return_experts: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        """Raise APIError for fields that would have an effect in OpenAI's API, and remove those without one."""
        if not isinstance(data, dict):
            return data
        for name, neutral in NOT_SUPPORTED.items():
            if data.get(name, neutral[0]) not in (None, *neutral):
                raise APIError(400, f"{name} is not supported; leave it out", name, "unsupported_parameter")
        return {name: value for name, value in data.items() if name not in IGNORED | NOT_SUPPORTED.keys()}

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, number: int) -> Sampling:
        """Return the sampling options of choice `number` of a prompt. Raises APIError if one is out of range."""
        given = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        if self.seed is not None:
            given["seed"] = self.seed + number
        try:
            return Sampling(**{name: value for name, value in given.items() if value is not None})
        except UserError as error:
            raise APIError(400, str(error), str(error).partition(":")[0]) from None


class CompletionRequest(GenerationRequest):
    prompt: UnicodeText | list[UnicodeText] | list[int] | list[list[int]]

    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, of which there may be several; each is a text or a list of tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [token for token in self.prompt if isinstance(token, int)]
        return [tokens] if tokens else [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class TextPart(_Body):
    type: Literal["text"]
    text: UnicodeText


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: UnicodeText | list[TextPart]
    name: str | None = None

    def as_message(self) -> dict[str, str]:
        """The message for the chat template."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
