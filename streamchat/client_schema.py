"""The bodies that other people's clients send become a `ChatRequest`: the AI SDK's transport, and OpenAI's clients.

The same checks as in schema.py; what cannot be relayed is refused, never dropped in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .checks import GATEWAY_PARAMS, PARAMS
from .errors import InvalidRequest
from .schema import ChatRequest, Message, check_context, check_model, check_params, check_size, validated
from .settings import Settings


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: str
    text: str = ""


class _UiMessage(BaseModel):
    """A UIMessage; what it carries besides its parts is the page's own."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["user", "assistant"]
    parts: list[_Part]


class _UiBody(BaseModel):
    """What DefaultChatTransport sends, and what its option `body` may add."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | None = Field(None, max_length=255)
    messages: list[_UiMessage]
    trigger: str | None = None
    messageId: str | None = None
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    max_output_tokens: int | None = Field(None, ge=1)
    context: dict[str, Any] | None = None


def parse_ui_request(body: bytes, settings: Settings) -> ChatRequest:
    """Raises InvalidRequest or PayloadTooLarge. Turns without text are left out: those of a tool, or cut at once."""
    parsed = validated(_UiBody, body)
    turns = [_turn(index, message) for index, message in enumerate(parsed.messages)]
    messages = tuple(turn for turn in turns if turn.content.strip())
    if not messages or messages[-1].role != "user" or not turns[-1].content.strip():
        raise InvalidRequest('The last of "messages" must have the role "user" and a part with text.')
    check_size(messages, settings)
    return ChatRequest(
        messages=messages,
        model=check_model(parsed.model, settings),
        params=check_params({name: getattr(parsed, name) for name in PARAMS}, settings),
        context=check_context(parsed.context),
        chat=parsed.id,
    )


def _turn(index: int, message: _UiMessage) -> Message:
    """The text parts of a turn. Of an assistant's turn everything else is left out; a user's would be missed."""
    for part in message.parts:
        if message.role == "user" and part.type != "text" and not part.type.startswith("data-"):
            raise InvalidRequest(f'The field "messages.{index}.parts" holds a part that is not text.')
    return Message(message.role, "".join(part.text for part in message.parts if part.type == "text"))


class _WireMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


MOST_CHOICES = 8  # each of them may cost STREAMCHAT_MAX_OUTPUT_TOKENS


class _WireBody(BaseModel):
    """A Chat Completions request. Its parameters are checked by name against the allow-list."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[_WireMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, strict=True)
    logprobs: bool | None = Field(None, strict=True)
    top_logprobs: int | None = Field(None, ge=0, le=20, strict=True)


# What says nothing more than the default does: clients send it unasked.
HARMLESS: dict[str, tuple[Any, ...]] = {"store": (False, None)}
# The Responses API gives one answer, and tells probabilities without the bytes of their tokens.
CHAT_ONLY = ("n", "logprobs", "top_logprobs")


@dataclass(frozen=True)
class Delivery:
    """How an OpenAI client wants its answer."""

    stream: bool
    include_usage: bool
    choices: int = 1


def parse_gateway_request(body: bytes, settings: Settings) -> tuple[ChatRequest, Delivery]:
    """What is asked, and how it is to be told.

    Raises InvalidRequest or PayloadTooLarge.
    """
    parsed = validated(_WireBody, body)
    wire = tuple(message.model_dump(exclude_none=True) for message in parsed.messages)
    messages = tuple(Message(message["role"], _words(message.get("content"))) for message in wire)
    _check_roles(messages, wire, settings)
    check_size(messages, settings)
    asked = ChatRequest(messages, check_model(parsed.model, settings), _gateway_params(parsed, settings), {}, wire)
    include_usage = parsed.stream_options is not None and parsed.stream_options.include_usage
    return asked, Delivery(parsed.stream, include_usage, parsed.n or 1)


def _words(content: str | list[dict[str, Any]] | None) -> str:
    if isinstance(content, list):
        if any(part.get("type") not in ("text", "refusal") for part in content):
            raise InvalidRequest('The field "messages" holds a part that is not text.')
        return "".join(str(part.get("text") or part.get("refusal") or "") for part in content)
    return content or ""


def _check_roles(messages: tuple[Message, ...], wire: tuple[dict[str, Any], ...], settings: Settings) -> None:
    for index, message in enumerate(messages):
        if message.role in ("system", "developer") and settings.system_prompt:
            raise InvalidRequest(f'The field "messages.{index}.role": the server owns the system prompt.')
        uses_tools = message.role == "tool" or "tool_calls" in wire[index]
        if uses_tools and "tools" not in settings.params:
            raise InvalidRequest(f'The field "messages.{index}": tools may not be used here.')


def _gateway_params(parsed: _WireBody, settings: Settings) -> dict[str, Any]:
    extra = parsed.model_extra or {}
    for name, value in extra.items():
        if name in HARMLESS and value in HARMLESS[name]:
            continue
        if name not in GATEWAY_PARAMS:
            raise InvalidRequest(f'The field "{name[:100]}" may not be set here.')
    named = {name: value for name, value in extra.items() if name in GATEWAY_PARAMS}
    longest = parsed.max_completion_tokens or parsed.max_tokens
    known = {"temperature": parsed.temperature, "top_p": parsed.top_p, "max_output_tokens": longest}
    return check_params({**known, **_choices(parsed, settings), **named}, settings)


def _choices(parsed: _WireBody, settings: Settings) -> dict[str, Any]:
    """How many answers, and with which probabilities; None for what says no more than the default does."""
    if parsed.top_logprobs is not None and not parsed.logprobs:
        raise InvalidRequest('The field "top_logprobs" needs "logprobs": true.')
    n = parsed.n if parsed.n != 1 else None
    asked = {"n": n, "logprobs": parsed.logprobs or None, "top_logprobs": parsed.top_logprobs}
    for name in CHAT_ONLY:
        if asked[name] is not None and settings.upstream_api != "chat":
            raise InvalidRequest(f'The field "{name}" cannot be used here: the model is asked by the Responses API.')
    return asked
