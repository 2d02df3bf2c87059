"""The bytes of a request body become a `ChatRequest`, or an error that names the field. Never sees Flask.

What a caller may not set is refused, not ignored; no error repeats what the caller sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .addresses import is_listed, parse_target
from .checks import PARAMS
from .errors import InvalidRequest, PayloadTooLarge
from .settings import Settings

CONTEXT_BYTES = 4096  # the shop's own object; an id or two, not a place for documents


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a caller asks, after every check. `params` holds only what the settings let callers set.

    `wire` holds the messages of an OpenAI client as it sent them, with tool calls and other roles; None for all others.
    `chat` is the id that a client of the AI SDK gave the conversation. `webhook_url` goes with `background`.
    """

    messages: tuple[Message, ...]
    model: str
    params: dict[str, Any]
    context: dict[str, Any]
    wire: tuple[dict[str, Any], ...] | None = None
    chat: str | None = None
    background: bool = False
    webhook_url: str | None = None


Kind = TypeVar("Kind", bound=BaseModel)


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["user", "assistant"]
    content: str


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    message: str | None = None
    messages: list[_Message] | None = None
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    max_output_tokens: int | None = Field(None, ge=1)
    context: dict[str, Any] | None = None
    background: bool = False
    webhook_url: str | None = None


def parse_request(body: bytes, settings: Settings) -> ChatRequest:
    """A ChatRequest out of a JSON body.

    Raises InvalidRequest (400), naming the field, or PayloadTooLarge (413) for too much text.
    """
    parsed = validated(_Body, body)
    messages = _messages(parsed)
    check_size(messages, settings)
    return ChatRequest(
        messages=messages,
        model=check_model(parsed.model, settings),
        params=_params(parsed, settings),
        context=check_context(parsed.context),
        background=_check_background(parsed, settings),
        webhook_url=_check_webhook(parsed, settings),
    )


def validated(kind: type[Kind], body: bytes) -> Kind:
    """The body as a model. Raises InvalidRequest, naming the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # Input and cause stay out: they hold what the caller wrote.
        reason = _reason(error.errors(include_url=False, include_input=False, include_context=False)[0])
    raise InvalidRequest(reason)


REASONS = {
    "json_invalid": "The body is not valid JSON.",
    "model_type": "{field} must be an object.",
    "extra_forbidden": "{field} is not a field of this request.",
    "missing": "{field} is missing.",
    "literal_error": "{field} must be 'user' or 'assistant'.",
    "string_type": "{field} must be text.",
    "list_type": "{field} must be a list.",
    "dict_type": "{field} must be an object.",
}


def _reason(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])[:100]
    shown = f"The field {json.dumps(field)}" if field else "The body"
    sentence = REASONS.get(error["type"])
    return sentence.format(field=shown) if sentence else f"{shown}: {error['msg']}."


def _messages(body: _Body) -> tuple[Message, ...]:
    if (body.message is None) == (body.messages is None):
        raise InvalidRequest('Send either "message", a text, or "messages", a list of {"role", "content"}.')
    given = body.messages if body.messages is not None else [_Message(role="user", content=body.message or "")]
    if not given:
        raise InvalidRequest('The field "messages" must hold at least one message.')
    for index, message in enumerate(given):
        if not message.content.strip():
            field = "message" if body.message is not None else f"messages.{index}.content"
            raise InvalidRequest(f'The field "{field}" must not be blank.')
    if given[-1].role != "user":
        raise InvalidRequest('The last of "messages" must have the role "user".')
    return tuple(Message(message.role, message.content) for message in given)


def check_size(messages: tuple[Message, ...], settings: Settings) -> None:
    if sum(len(message.content) for message in messages) > settings.max_input_chars:
        raise PayloadTooLarge(f"The messages hold more than {settings.max_input_chars} characters.")


def check_model(model: str | None, settings: Settings) -> str:
    if model is not None and model != settings.model and model not in settings.models:
        raise InvalidRequest('The field "model" names a model that is not offered here.')
    return model or settings.model


def _params(body: _Body, settings: Settings) -> dict[str, Any]:
    return check_params({name: getattr(body, name) for name in PARAMS}, settings)


def check_params(given: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Those that were sent. Raises InvalidRequest for one that callers may not set."""
    sent = {name: value for name, value in given.items() if value is not None}
    for name in sent:
        if name not in settings.params:
            raise InvalidRequest(f'The field "{name}" may not be set here.')
    if sent.get("max_output_tokens", 0) > settings.max_output_tokens:
        raise InvalidRequest(f'The field "max_output_tokens" may be at most {settings.max_output_tokens}.')
    return sent


def _check_background(body: _Body, settings: Settings) -> bool:
    if body.background and not settings.background:
        raise InvalidRequest('The field "background" may not be set here.')
    return body.background


def _check_webhook(body: _Body, settings: Settings) -> str | None:
    """Only a host that the operator listed. Raises InvalidRequest."""
    url = body.webhook_url
    if url is None:
        return None
    if not settings.webhook_hosts:
        raise InvalidRequest('The field "webhook_url" may not be set here.')
    if not body.background:
        raise InvalidRequest('The field "webhook_url" needs "background": true.')
    try:
        target = parse_target(url, loopback=settings.webhook_loopback)
    except ValueError as error:
        raise InvalidRequest(f'The field "webhook_url" {error}.') from None
    if not is_listed(target, settings.webhook_hosts):
        raise InvalidRequest('The field "webhook_url" names a host that is not allowed here.')
    return url


def check_context(context: dict[str, Any] | None) -> dict[str, Any]:
    if not context:
        return {}
    try:
        written = json.dumps(context, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:  # NaN is not JSON, though parsers take it
        raise InvalidRequest('The field "context" must hold JSON.') from None
    if len(written) > CONTEXT_BYTES:
        raise InvalidRequest(f'The field "context" may hold at most {CONTEXT_BYTES} bytes of JSON.')
    return context
