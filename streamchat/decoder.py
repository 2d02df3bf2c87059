"""The upstream's bytes become events, by Chat Completions chunks. Pure; any split gives the same events.

Tolerant where servers differ (missing usage, empty choices), strict where an answer could look whole and is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jiter

from .errors import (
    ContentRefused,
    InputTooLong,
    UpstreamError,
    UpstreamFailure,
    UpstreamIncomplete,
    UpstreamMalformed,
    UpstreamQuota,
    UpstreamRateLimited,
)
from .events import Event, Finish, Reasoning, Refusal, Text, ToolCall, Usage
from .sse_decoder import SseDecoder

# The `code` or `type` of an upstream error object, in a stream or in the body of a 4xx.
ERROR_CODES: dict[str, type[UpstreamFailure]] = {
    "context_length_exceeded": InputTooLong,
    "exceed_context_size_error": InputTooLong,  # llama.cpp
    "string_above_max_length": InputTooLong,
    "content_policy_violation": ContentRefused,
    "content_filter": ContentRefused,  # Azure
    "insufficient_quota": UpstreamQuota,
    "rate_limit_exceeded": UpstreamRateLimited,
}
MOST_TOKENS = 10**12  # of one answer: no model counts so many, and no sum of them leaves the 64 bits of a database
_SAFE_CODE = re.compile(r"[a-z0-9_.]{1,64}")


def parsed(payload: bytes) -> Any:
    """JSON. jiter takes a third of the time of the standard library, but does not read lone surrogates."""
    try:
        return jiter.from_json(payload)
    except ValueError:
        return json.loads(payload)


class StreamDecoder:
    """Bytes of an answer's stream to events; ends with Finish, or raises an UpstreamFailure."""

    def __init__(self) -> None:
        self._sse = SseDecoder()
        self._join = SurrogateJoiner()
        self._finish_reason: str | None = None
        self.failure: UpstreamFailure | None = None  # raised by the next call
        self._usage: Usage | None = None
        self.finished = False
        self.done = False  # the upstream has said all
        self.error_code: str | None = None

    @property
    def concluding(self) -> bool:
        """The answer is whole; only its usage may still come."""
        return self._finish_reason is not None

    def feed(self, data: bytes) -> list[Event]:
        """Events that these bytes complete; [] for none. b"" is the end of the stream.

        A failure that follows events in the same bytes is raised by the next call, so that a split changes nothing.
        """
        if self.failure is not None:
            raise self.failure
        events: list[Event] = []
        try:
            self._read(data, events)
        except UpstreamFailure as failure:
            if not events:
                raise
            self.failure = failure
        return events

    def _read(self, data: bytes, events: list[Event]) -> None:
        for kind, payload in self._sse.feed(data):
            if payload.startswith(b"[DONE]"):
                self.done = True
                break
            events += self._chunk(kind, payload)
            if self.done:
                break
        if self.done or not data:
            events += self.conclude()

    def conclude(self) -> list[Event]:
        """The end. Raises UpstreamIncomplete where no finish_reason was given: that answer was cut."""
        if self.failure is not None:
            raise self.failure
        if self._finish_reason is None:
            raise UpstreamIncomplete
        self.finished = True
        rest = [rest_of(kind, text) for kind, text in self._join.rest()]
        return [*rest, Finish(self._finish_reason, self._usage)]

    def _chunk(self, kind: bytes, payload: bytes) -> list[Event]:
        try:
            chunk = parsed(payload)
        except (ValueError, RecursionError):
            raise UpstreamMalformed from None
        if not isinstance(chunk, dict):
            raise UpstreamMalformed
        if kind == b"error" or chunk.get("error"):
            raise self._error(chunk.get("error") or chunk)
        try:
            return self._events(chunk)
        except (TypeError, AttributeError, ValueError, KeyError):
            raise UpstreamMalformed from None

    def _error(self, error: Any) -> UpstreamFailure:
        self.error_code = public_code(error)
        return error_kind(error, UpstreamError)()

    def _events(self, chunk: dict[str, Any]) -> list[Event]:
        """The events of one chunk. What it raises by a wrong shape becomes UpstreamMalformed."""
        raise NotImplementedError

    def _text(self, kind: str, text: Any) -> list[Event]:
        """A piece of text, reasoning or refusal; [] where nothing of it can be told yet."""
        if not text:
            return []
        if not isinstance(text, str):
            raise TypeError
        whole = self._join.join(kind, text)
        return [_TEXTS[kind](whole)] if whole else []

    def _arguments(self, index: int, text: Any) -> str:
        return self._join.join(f"tool {index}", string(text or ""))


class ChatDecoder(StreamDecoder):
    """Bytes of a Chat Completions stream to events."""

    def _events(self, chunk: dict[str, Any]) -> list[Event]:
        if usage := chunk.get("usage"):
            self._count(usage)
        for choice in chunk.get("choices") or ():
            if choice.get("index") or 0:
                continue  # we ask for one answer; a second one is nobody's
            if choice.get("finish_reason"):
                self._finish_reason = string(choice["finish_reason"])
            return self._delta(choice.get("delta") or {})
        return []

    def _count(self, usage: Any) -> None:
        self._usage = usage_of(usage, "prompt_tokens", "completion_tokens") or self._usage

    def _delta(self, delta: dict[str, Any]) -> list[Event]:
        if len(delta) == 1 and "content" in delta:  # what nearly all deltas are
            return self._text("text", delta["content"])
        events: list[Event] = []
        for field, kind in _FIELDS:
            value = delta.get(field)
            if value and not (field == "reasoning" and value == delta.get("reasoning_content")):
                events += self._text(kind, value)  # vLLM sends both names of reasoning for a while
        for call in delta.get("tool_calls") or ():
            events.append(self._tool_call(call))
        return events

    def _tool_call(self, call: dict[str, Any]) -> ToolCall:
        function, index = call.get("function") or {}, int(call.get("index") or 0)
        arguments = self._arguments(index, function.get("arguments"))
        return ToolCall(index, optional_string(call.get("id")), optional_string(function.get("name")), arguments)


_FIELDS = (
    ("reasoning_content", "reasoning"),  # DeepSeek, llama.cpp, vLLM
    ("reasoning", "reasoning"),  # OpenRouter, Ollama
    ("content", "text"),
    ("refusal", "refusal"),
)
_TEXTS: dict[str, Callable[[str], Event]] = {"text": Text, "reasoning": Reasoning, "refusal": Refusal}


class SurrogateJoiner:
    """Text whose emoji may be split over two deltas: a trailing high surrogate waits for the next of its kind."""

    def __init__(self) -> None:
        self._held: dict[str, str] = {}

    def join(self, kind: str, text: str) -> str:
        """The text that can be written now; lone surrogates become U+FFFD."""
        if text.isascii() and not self._held:
            return text
        text = self._held.pop(kind, "") + text
        if "\ud800" <= text[-1:] <= "\udbff":
            self._held[kind], text = text[-1], text[:-1]
        return mended(text)

    def rest(self) -> list[tuple[str, str]]:
        """What still waits at the end has lost its other half."""
        held, self._held = self._held, {}
        return [(kind, mended(text)) for kind, text in held.items()]


def mended(text: str) -> str:
    """The text with U+FFFD for lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def string(value: Any) -> str:
    """The value, or TypeError."""
    if not isinstance(value, str):
        raise TypeError
    return value


def optional_string(value: Any) -> str | None:
    return None if value is None else string(value)


def rest_of(kind: str, text: str) -> Event:
    """The event of what a SurrogateJoiner still held."""
    make = _TEXTS.get(kind)
    return make(text) if make else ToolCall(int(kind.removeprefix("tool ")), None, None, text)


def usage_of(usage: Any, sent_name: str, received_name: str) -> Usage | None:
    """None where it cannot be read: an answer is not lost for its bill, which is estimated then."""
    if not isinstance(usage, dict):
        return None
    sent: Any = usage.get(sent_name)
    received: Any = usage.get(received_name) or 0
    if any(type(count) is not int or not 0 <= count <= MOST_TOKENS for count in (sent, received)):
        return None
    return Usage(sent, received)


def _names(error: Any) -> list[str]:
    if not isinstance(error, dict):
        return []
    return [name for name in (error.get("code"), error.get("type")) if isinstance(name, str)]


def error_kind(error: Any, otherwise: type[UpstreamFailure]) -> type[UpstreamFailure]:
    """The failure that an upstream's error object means."""
    return next((ERROR_CODES[name] for name in _names(error) if name in ERROR_CODES), otherwise)


def public_code(error: Any) -> str | None:
    """The code of an upstream's error object, if it is safe to log: a word, not a sentence that may hold a key."""
    return next((name for name in _names(error) if _SAFE_CODE.fullmatch(name)), None)
