"""How each kind of client asks and is told of an error: our own callers, the AI SDK, OpenAI's clients. No Flask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .client_encoders import UI_ENCODERS, OpenAiEncoder, OpenAiWholeEncoder, openai_error
from .client_schema import parse_gateway_request, parse_ui_request
from .encoders import Encoder, choose_encoder
from .errors import StreamChatError
from .schema import ChatRequest, parse_request
from .settings import Settings


@dataclass(frozen=True)
class Dialect:
    """`read` makes of a body, the settings and an Accept header what is asked, and the encoder that answers.

    `tell` makes of an error, the words for it and the answer's id a JSON document and its content type.
    """

    read: Callable[[bytes, Settings, str | None], tuple[ChatRequest, Encoder]]
    tell: Callable[[StreamChatError, str, str], tuple[dict[str, Any], str]]


def _read_own(body: bytes, settings: Settings, accept: str | None) -> tuple[ChatRequest, Encoder]:
    encoder = choose_encoder(accept)()
    return parse_request(body, settings), encoder


def _read_ui(body: bytes, settings: Settings, accept: str | None) -> tuple[ChatRequest, Encoder]:
    encoder = choose_encoder(accept, UI_ENCODERS)()
    return parse_ui_request(body, settings), encoder


def _read_openai(body: bytes, settings: Settings, accept: str | None) -> tuple[ChatRequest, Encoder]:
    """OpenAI's clients say in the body what they want; their Accept header names JSON even where they stream."""
    asked, delivery = parse_gateway_request(body, settings)
    if not delivery.stream:
        return asked, OpenAiWholeEncoder()
    return asked, OpenAiEncoder(delivery.include_usage, delivery.choices)


def _problem(error: StreamChatError, words: str, answer_id: str) -> tuple[dict[str, Any], str]:
    """RFC 9457 problem details; `code` is ours, `request_id` is that of the header X-Response-Id."""
    document = {
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "detail": words,
        "code": error.code,
        "request_id": answer_id,
    }
    return document, "application/problem+json"


def _openai_problem(error: StreamChatError, words: str, answer_id: str) -> tuple[dict[str, Any], str]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": openai_error(words, error.code, kind)}, "application/json"


OWN = Dialect(_read_own, _problem)
UI = Dialect(_read_ui, _problem)
OPENAI = Dialect(_read_openai, _openai_problem)
