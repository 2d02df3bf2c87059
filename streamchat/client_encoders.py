"""Events become the bytes that other people's clients speak: the AI SDK's UI message stream, and OpenAI's own wire.

Only chunk types and fields that every `ai` 5, 6 and 7 accepts are written: older ones refuse what they do not know.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

from .encoders import Encoder, Gathered, TextEncoder, WholeEncoder, dumps, joined
from .events import (
    ChoiceEnd,
    Event,
    Failure,
    Finish,
    Logprobs,
    Reasoning,
    Refusal,
    Start,
    Text,
    ToolCall,
    usage_json,
)

DONE = b"data: [DONE]\n\n"


def data(chunk: dict[str, Any]) -> bytes:
    """One server-sent event without a name."""
    return b"data: " + dumps(chunk).encode("ascii") + b"\n\n"


class UiEncoder(Encoder):
    """UI message stream v1, for `useChat`. A failure closes the open part, then says `error`; never `finish`."""

    mimetype = "text/event-stream"
    content_type = "text/event-stream; charset=utf-8"
    heartbeat = b": keep-alive\n"
    headers: ClassVar[dict[str, str]] = {"x-vercel-ai-ui-message-stream": "v1"}

    def __init__(self) -> None:
        self._part: tuple[str, str] | None = None  # kind and id of the open one
        self._parts = 0
        self._calls: dict[int, ToolCall] = {}

    def encode(self, seq: int, event: Event) -> bytes:
        if isinstance(event, Start):
            return data({"type": "start", "messageId": event.id}) + data({"type": "start-step"})
        if isinstance(event, (Text, Refusal)):
            return self._piece("text", event.text)
        if isinstance(event, Reasoning):
            return self._piece("reasoning", event.text)
        if isinstance(event, ToolCall):
            return self._close() + self._call(event)
        if isinstance(event, ChoiceEnd):
            return b""  # useChat asks for one answer
        return self._close() + (self._finish(event) if isinstance(event, Finish) else self._fail(event)) + DONE

    def _piece(self, kind: str, text: str) -> bytes:
        opening = b"" if self._part is not None and self._part[0] == kind else self._close() + self._open(kind)
        assert self._part is not None
        return opening + data({"type": f"{kind}-delta", "id": self._part[1], "delta": text})

    def _open(self, kind: str) -> bytes:
        self._part = (kind, f"{kind}-{self._parts}")
        self._parts += 1
        return data({"type": f"{kind}-start", "id": self._part[1]})

    def _close(self) -> bytes:
        if self._part is None:
            return b""
        (kind, part), self._part = self._part, None
        return data({"type": f"{kind}-end", "id": part})

    def _call(self, piece: ToolCall) -> bytes:
        known = self._calls.get(piece.index)
        call = self._calls[piece.index] = joined(known, piece)
        start = {"type": "tool-input-start", "toolCallId": _call_id(call), "toolName": call.name or "tool"}
        delta = {"type": "tool-input-delta", "toolCallId": _call_id(call), "inputTextDelta": piece.arguments}
        return (data(start) if known is None else b"") + (data(delta) if piece.arguments else b"")

    def _finish(self, finish: Finish) -> bytes:
        metadata = {"finishReason": finish.finish_reason, "usage": usage_json(finish.usage)}
        calls = b"".join(data(chunk) for call in self._calls.values() for chunk in _input(call))
        return calls + data({"type": "finish-step"}) + data({"type": "finish", "messageMetadata": metadata})

    def _fail(self, failure: Failure) -> bytes:
        return data({"type": "error", "errorText": failure.message})


def _call_id(call: ToolCall) -> str:
    return call.id or f"call-{call.index}"


def _input(call: ToolCall) -> list[dict[str, Any]]:
    """What ends a tool's input. One that is not JSON is told as output: ai 5.0.0 knows no tool-input-error."""
    chunk = {"type": "tool-input-available", "toolCallId": _call_id(call), "toolName": call.name or "tool"}
    try:
        return [{**chunk, "input": json.loads(call.arguments or "{}")}]
    except ValueError:
        failed = {"type": "tool-output-error", "toolCallId": _call_id(call), "errorText": "The input is not JSON."}
        return [{**chunk, "input": call.arguments}, failed]


# What POST /chat writes; the first for a client that does not say, which `useChat` does not.
UI_ENCODERS: dict[str, type[Encoder]] = {encoder.mimetype: encoder for encoder in (UiEncoder, TextEncoder)}


class OpenAiEncoder(Encoder):
    """chat.completion.chunk objects of so many choices. A failure is an error object, and no [DONE]."""

    mimetype = "text/event-stream"
    content_type = "text/event-stream; charset=utf-8"
    heartbeat = b": keep-alive\n"

    def __init__(self, include_usage: bool = False, choices: int = 1) -> None:
        self._include_usage = include_usage
        self._choices = choices
        self._head: dict[str, Any] = {}

    def encode(self, seq: int, event: Event) -> bytes:
        if isinstance(event, Start):
            self._head = _head(event, "chat.completion.chunk")
            role = {"role": "assistant", "content": ""}
            return b"".join([self._chunk(index, role) for index in range(self._choices)])
        if isinstance(event, Finish):
            end = self._chunk(0, {}, None, event.finish_reason) if self._choices == 1 else b""  # else told by ChoiceEnd
            return end + self._usage(event) + DONE
        if isinstance(event, Failure):
            return data({"error": openai_error(event.message, event.code, "server_error")})
        if isinstance(event, ChoiceEnd):
            return self._chunk(event.choice, {}, None, event.finish_reason)
        return self._chunk(event.choice, _delta(event), event.logprobs)

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Logprobs | None = None, finish_reason: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return data({**self._head, "choices": [choice], **({"usage": None} if self._include_usage else {})})

    def _usage(self, finish: Finish) -> bytes:
        return data({**self._head, "choices": [], "usage": _usage(finish)}) if self._include_usage else b""


class OpenAiWholeEncoder(WholeEncoder):
    """One chat.completion object."""

    def body(self, start: Start, finish: Finish) -> dict[str, object]:
        count = max(self.choices, default=0) + 1  # an empty answer has one, too
        choices = [_choice(index, self.choices[index], finish.finish_reason) for index in range(count)]
        return {**_head(start, "chat.completion"), "choices": choices, "usage": _usage(finish)}


def _choice(index: int, said: Gathered, finish_reason: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.text("text") or None}
    message["refusal"] = said.text("refusal") or None
    if said.text("reasoning"):
        message["reasoning_content"] = said.text("reasoning")
    if said.calls:
        message["tool_calls"] = [_tool_call(call) for call in said.calls.values()]
    logprobs = {kind: tokens or None for kind, tokens in said.logprobs.items()} or None
    ended = said.finish_reason or finish_reason
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": ended}


def openai_error(message: str, code: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """What stands under `error` in OpenAI's answers."""
    return {"message": message, "type": kind, "param": param, "code": code}


def _head(start: Start, kind: str) -> dict[str, Any]:
    return {"id": start.id, "object": kind, "created": start.created_at, "model": start.model}


def _delta(event: Event) -> dict[str, Any]:
    if isinstance(event, ToolCall):
        return {"tool_calls": [{"index": event.index, **_tool_call(event)}]}
    fields = {"text": "content", "reasoning": "reasoning_content", "refusal": "refusal"}
    return {fields[event.type]: event.text}  # type: ignore[union-attr]


def _tool_call(call: ToolCall) -> dict[str, Any]:
    named = {"id": call.id, "type": "function"} if call.id else {}
    function = {"name": call.name, "arguments": call.arguments} if call.name else {"arguments": call.arguments}
    return {**named, "function": function}


def _usage(finish: Finish) -> dict[str, int] | None:
    usage = finish.usage
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
    }
