"""What may be asked, field by field, and what is answered. Fields that would change an answer and that this server does
not know are refused; those that change nothing are taken and passed over."""

import secrets
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inference.request import Request
from inference.sampling_settings import SamplingSettings
from pipelines.server.errors import ApiError, invalid

MOST_STOPS, LONGEST_STOP, MOST_PROMPTS = 4, 256, 64

Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
TokenId = Annotated[int, Field(ge=0)]
NonNegative = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    """Of a stream: whether a last chunk tells the usage."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(BaseModel):
    """What both kinds of completion share.

    `return_token_ids` and `dspark` are extensions: token ids beside the text, and what speculation made of the request.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    temperature: float | None = Field(default=None, ge=0.0, le=10.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, le=1 << 31)
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=100.0)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    dspark: bool = False
    # Taken, and they change nothing.
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Taken with the value that changes nothing.
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    CLOSED: ClassVar[dict[str, str]] = {
        "n": "one answer a request; send it several times",
        "presence_penalty": "leave it out or 0; repetition_penalty is there",
        "frequency_penalty": "leave it out or 0; repetition_penalty is there",
        "logit_bias": "leave it out",
        "logprobs": "log probabilities are not given; leave it out",
        "top_logprobs": "log probabilities are not given; leave it out",
        "best_of": "leave it out or 1",
        "echo": "leave it out or false",
        "suffix": "leave it out",
        "tools": "this server calls no tools; leave it out",
        "tool_choice": "this server calls no tools; leave it out, or none or auto",
        "functions": "this server calls no tools; leave it out",
        "response_format": "answers are free text; leave it out",
        "reasoning_effort": "leave it out",
        "modalities": "answers are text; leave it out",
        "audio": "answers are text; leave it out",
    }
    """Why a field is refused whose value would change an answer."""

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def domain(self) -> str:
        """Of the prompt, by the request's metadata."""
        return (self.metadata or {}).get("domain", "")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def drawn_seed(self) -> int:
        """The seed asked for, or a fresh one."""
        return secrets.randbits(63) if self.seed is None else self.seed

    def settings(self) -> SamplingSettings:
        """How tokens are drawn; as with OpenAI, a request that does not say draws at temperature 1."""
        return SamplingSettings(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
        )

    def request(self, *, max_new_tokens: int, stop_tokens: frozenset[int]) -> Request:
        """What the decoder is asked."""
        return Request(settings=self.settings(), max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)


class CompletionRequest(Asked):
    """`/v1/completions`."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    logprobs: None = None

    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(BaseModel):
    """Free text alone."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class ChatRequest(Asked):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    def plain_messages(self) -> list[dict[str, str]]:
        """As chat templates read them."""
        return [message.plain() for message in self.messages]


_Request = TypeVar("_Request", bound=Asked)


def parsed(kind: type[_Request], body: bytes) -> _Request:
    """Read a request.

    Raises:
        ApiError: it is no JSON, lacks a field, or asks for what this server does not do.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    """One line on the first thing that is wrong; the client's own values are not repeated."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if not first["loc"]:
        return invalid(f"the body is no such request: {first['msg']}", code="invalid_json")
    field = str(first["loc"][0])
    if field in Asked.CLOSED:
        return invalid(f"{field} is not supported: {Asked.CLOSED[field]}", param=field, code="unsupported_parameter")
    if first["type"] == "extra_forbidden":
        path = ".".join(str(part) for part in first["loc"])[:100]
        return invalid(f"unknown field {path!r}", param=field[:100], code="unknown_parameter")
    place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier())
    return invalid(f"{place}: {first['msg']}", param=field, code="invalid_value")


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
