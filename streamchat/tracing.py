"""One answer becomes one span of OpenTelemetry, by the attributes of its GenAI conventions. Its API only, no SDK.

A span is a child of what is current where its answer begins, and never current itself: nothing leaks into the stream.
What was asked and answered stays out of it, unless the settings want it in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .ending import CANCELLED
from .errors import SettingsError
from .ledger import Record
from .prompt import Prompt
from .settings import Settings

NAME = "streamchat"
PROVIDER = "openai"  # whose form the upstream's API has
# Parameters by our names, attributes by the conventions'.
PARAMS = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "max_output_tokens": "gen_ai.request.max_tokens",
    "n": "gen_ai.request.choice.count",
    "seed": "gen_ai.request.seed",
}


def check_tracing(settings: Settings) -> None:
    """At the start. Raises SettingsError where the library is missing."""
    if not settings.tracing:
        return
    try:
        import opentelemetry.trace  # noqa: F401
    except ImportError:
        raise SettingsError(
            "STREAMCHAT_TRACING needs opentelemetry-api: pip install 'flask-streamchat[tracing]'."
        ) from None


def open_spans(settings: Settings) -> Spans | None:
    """None where tracing is off. Raises SettingsError as check_tracing."""
    check_tracing(settings)
    return Spans(settings.tracing_text) if settings.tracing else None


class Spans:
    """The spans of one mount's answers, by their ids. `begin` and `end` never wait; an exporter works elsewhere."""

    def __init__(self, with_text: bool) -> None:
        from opentelemetry import trace

        self._tracer = trace.get_tracer(NAME)
        self._with_text = with_text
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, id: str, prompt: Prompt, client: Any) -> None:
        """In the context of the request: its span becomes the parent."""
        told = _asked(prompt.model) | _server(client)
        told |= {name: prompt.params[param] for param, name in PARAMS.items() if param in prompt.params}
        if self._with_text:
            told |= _said(prompt.messages)
        self._open[id] = self._start(told)

    def _start(self, attributes: Mapping[str, Any], at: int | None = None) -> Any:
        from opentelemetry.trace import SpanKind

        name = f"{attributes['gen_ai.operation.name']} {attributes['gen_ai.request.model']}"
        return self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=dict(attributes), start_time=at)

    def end(self, record: Record, text: str) -> None:
        """With what the record says. Of an answer that was begun elsewhere the span is made now, from its start on."""
        span = self._open.pop(record.id, None)
        if span is None:
            span = self._start(_asked(record.model), int(record.started * 1e9))
        try:
            span.set_attributes(_answered(record))
            if self._with_text:
                span.set_attribute("gen_ai.output.messages", _output(text, record.finish_reason))
            if (failed := _error(record)) is not None:
                from opentelemetry.trace import Status, StatusCode

                span.set_attribute("error.type", failed)
                span.set_status(Status(StatusCode.ERROR, failed))
        finally:
            span.end()


def _asked(model: str) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.request.stream": True,
    }


def _server(client: Any) -> dict[str, Any]:
    """Whom the client asks; a shop's own may not say."""
    url: Any = getattr(client, "base_url", None)
    host = getattr(url, "host", "")
    if not host:
        return {}
    return {"server.address": host, "server.port": url.port or (80 if url.scheme == "http" else 443)}


def _answered(record: Record) -> dict[str, Any]:
    told = {
        "gen_ai.response.id": record.id,
        "gen_ai.response.finish_reasons": [record.finish_reason] if record.finish_reason else None,
        "gen_ai.response.time_to_first_chunk": record.first_piece,
        "gen_ai.usage.input_tokens": record.input_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "streamchat.outcome": record.outcome,
        "streamchat.pieces": record.pieces,
        "streamchat.tokens_estimated": record.estimated,
        "streamchat.upstream.attempts": record.attempts,
        "streamchat.upstream.status": record.upstream_status,
        "streamchat.upstream.code": record.upstream_code,
        "streamchat.upstream.request_id": record.upstream_request_id,
    }
    return {name: value for name, value in told.items() if value is not None}


def _error(record: Record) -> str | None:
    """That somebody left or stopped the answer is no error."""
    return None if record.outcome in ("completed", *CANCELLED) else record.outcome


def _said(messages: Sequence[Any]) -> dict[str, str]:
    """What was asked, in the conventions' form: instructions apart from the conversation."""
    told = [message for message in messages if isinstance(message, Mapping)]
    system = [part for each in told if each.get("role") == "system" for part in _parts(each.get("content"))]
    turns = [
        {"role": each.get("role"), "parts": _parts(each.get("content"))}
        for each in told
        if each.get("role") != "system"
    ]
    return {"gen_ai.input.messages": _dumps(turns)} | ({"gen_ai.system_instructions": _dumps(system)} if system else {})


def _parts(content: Any) -> list[dict[str, Any]]:
    """Text is told; of pictures and the like only what they are."""
    if isinstance(content, str):
        return [{"type": "text", "content": content}]
    parts = content if isinstance(content, list) else []
    return [
        {"type": "text", "content": part["text"]} if part.get("type") == "text" else {"type": part.get("type")}
        for part in parts
        if isinstance(part, Mapping)
    ]


def _output(text: str, finish_reason: str | None) -> str:
    told = {"role": "assistant", "parts": [{"type": "text", "content": text}], "finish_reason": finish_reason or ""}
    return _dumps([told])


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, default=str)
