"""What an answer has come to so far: pieces, text, tokens, outcome. Becomes its one record."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .events import ChoiceEnd, Event, Finish, ToolCall, Usage
from .ledger import Record, Trail

CHARS_A_TOKEN = 4  # OpenAI's rule of thumb for English; used only where the upstream does not count
IMAGE_TOKENS = 1000  # OpenAI's guide to vision, in high detail: 765 for 1024 x 1024 pixels, 1105 for 2048 x 4096
IMAGES = ("image_url", "input_image")
NOT_SENT = ("upstream_unreachable", "overloaded")


class Tally:
    """Counts while the answer goes on. `text` is kept only where somebody will read it."""

    def __init__(self, messages: Sequence[Any], tools: Sequence[Any] = (), *, keep_text: bool) -> None:
        self.started = time.monotonic()
        self.created_at = time.time()
        self.trail = Trail()
        self.first_piece: float | None = None  # seconds after the start
        self.finish: Finish | None = None
        self.outcome: str | None = None
        self._asked = (messages, tools)
        self._pieces = 0
        self._chars = 0
        self._texts: dict[int, list[str]] | None = {} if keep_text else None  # of each choice

    @property
    def text(self) -> str:
        """What was said; several answers one after the other, a blank line between them."""
        return "\n\n".join("".join(pieces) for _, pieces in sorted((self._texts or {}).items()))

    def count(self, event: Event) -> Event:
        """The event as it is to be told: a Finish has its usage, estimated where the upstream did not count."""
        if isinstance(event, Finish):
            self.outcome = "completed"
            self.finish = event if event.usage is not None else replace(event, usage=self._estimate())
            return self.finish
        if isinstance(event, ChoiceEnd):
            return event
        text = event.arguments if isinstance(event, ToolCall) else event.text  # type: ignore[union-attr]
        self._pieces += 1
        self._chars += len(text)
        if self._texts is not None and event.type in ("text", "refusal"):
            self._texts.setdefault(event.choice, []).append(text)  # type: ignore[union-attr]
        return event

    def end(self, outcome: str) -> None:
        """The first end counts."""
        self.outcome = self.outcome or outcome

    def _estimate(self) -> Usage:
        asked = tokens_of(*self._asked) if self._was_taken() else 0
        return Usage(asked, -(-self._chars // CHARS_A_TOKEN), estimated=True)

    def _was_taken(self) -> bool:
        """Whether the upstream may have counted the prompt: not where it said no, or was not reached."""
        trail = self.trail
        return trail.attempts > 0 and trail.status in (None, 200) and self.outcome not in NOT_SENT

    def record(self, id: str, user: str | None, model: str) -> Record:
        usage = (self.finish and self.finish.usage) or self._estimate()
        return Record(
            id=id,
            user=user,
            model=model,
            started=self.created_at,
            first_piece=self.first_piece,
            duration=time.monotonic() - self.started,
            outcome=self.outcome or "interrupted",
            finish_reason=self.finish.finish_reason if self.finish else None,
            pieces=self._pieces,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            estimated=usage.estimated,
            attempts=self.trail.attempts,
            upstream_status=self.trail.status,
            upstream_request_id=self.trail.request_id,
            upstream_code=self.trail.code,
        )


def tokens_of(messages: Sequence[Any], tools: Sequence[Any] = ()) -> int:
    """What a question may cost: an estimate, with its tools, and with the calls and images in its conversation."""
    chars = sum(_length_of(message) for message in messages) + _json_length(tools)
    return -(-chars // CHARS_A_TOKEN)


def _length_of(message: Any) -> int:
    if not isinstance(message, dict):
        return 0
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else [content]
    return sum(_part_length(part) for part in parts) + _json_length(message.get("tool_calls"))


def _part_length(part: Any) -> int:
    if isinstance(part, str):
        return len(part)
    if isinstance(part, dict) and part.get("type") in IMAGES:
        return IMAGE_TOKENS * CHARS_A_TOKEN
    return _json_length(part)


def _json_length(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False, default=str)) if value else 0
