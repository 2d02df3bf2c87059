"""The bytes of a Responses API stream become events. Pure; the framing and the endings are those of decoder.py.

Its answers end by an event that says how: response.completed, response.incomplete or response.failed. No [DONE].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .decoder import StreamDecoder, optional_string, usage_of
from .events import Event, ToolCall

TEXT_DELTAS = {
    "response.output_text.delta": "text",
    "response.refusal.delta": "refusal",
    "response.reasoning_summary_text.delta": "reasoning",
    "response.reasoning_text.delta": "reasoning",
}
# Why an answer is incomplete, in the words of Chat Completions.
REASONS = {"max_output_tokens": "length", "content_filter": "content_filter"}


class ResponsesDecoder(StreamDecoder):
    """Bytes of a Responses API stream to events."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[int, int] = {}  # output_index -> index among the tool calls

    def _events(self, chunk: dict[str, Any]) -> list[Event]:
        kind = chunk.get("type")
        if kind in TEXT_DELTAS:
            return self._text(TEXT_DELTAS[kind], chunk.get("delta"))
        handle = HANDLERS.get(str(kind))
        return handle(self, chunk) if handle is not None else []  # of some fifty types these are the answer

    def _part_added(self, chunk: dict[str, Any]) -> list[Event]:
        """A summary has parts, and nothing between them; they would run into each other."""
        return self._text("reasoning", "\n\n") if chunk.get("summary_index") else []

    def _item(self, chunk: dict[str, Any]) -> list[Event]:
        """A tool call when it begins; some servers tell of it only when it is whole."""
        item = chunk["item"]
        if item.get("type") != "function_call" or chunk["output_index"] in self._calls:
            return []
        index = self._calls.setdefault(chunk["output_index"], len(self._calls))
        arguments = self._arguments(index, item.get("arguments"))
        return [ToolCall(index, optional_string(item.get("call_id")), optional_string(item.get("name")), arguments)]

    def _arguments_delta(self, chunk: dict[str, Any]) -> list[Event]:
        index = self._calls[chunk["output_index"]]
        return [ToolCall(index, None, None, self._arguments(index, chunk.get("delta")))]

    def _completed(self, chunk: dict[str, Any]) -> list[Event]:
        return self._ended(chunk, "tool_calls" if self._calls else "stop")

    def _incomplete(self, chunk: dict[str, Any]) -> list[Event]:
        details = chunk["response"].get("incomplete_details") or {}
        return self._ended(chunk, REASONS.get(str(details.get("reason")), "length"))

    def _ended(self, chunk: dict[str, Any], reason: str) -> list[Event]:
        self._finish_reason = reason
        self._usage = usage_of(chunk["response"].get("usage"), "input_tokens", "output_tokens")
        self.done = True
        return []

    def _failed(self, chunk: dict[str, Any]) -> list[Event]:
        """Two shapes: an `error` event with its code, and response.failed with an error in its response."""
        response = chunk.get("response")
        raise self._error(response.get("error") if isinstance(response, dict) else chunk)


HANDLERS: dict[str, Callable[[ResponsesDecoder, dict[str, Any]], list[Event]]] = {
    "response.output_item.added": ResponsesDecoder._item,
    "response.output_item.done": ResponsesDecoder._item,
    "response.reasoning_summary_part.added": ResponsesDecoder._part_added,
    "response.function_call_arguments.delta": ResponsesDecoder._arguments_delta,
    "response.completed": ResponsesDecoder._completed,
    "response.incomplete": ResponsesDecoder._incomplete,
    "response.failed": ResponsesDecoder._failed,
    "error": ResponsesDecoder._failed,
}
