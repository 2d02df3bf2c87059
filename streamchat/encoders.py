"""Events become the bytes of one format: text/plain, SSE, NDJSON, or one whole JSON object.

An encoder owns what it writes and remembers only what its format needs. It never sees a socket or a store.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from .errors import NotAcceptable
from .events import ENDS, ChoiceEnd, Event, Failure, Finish, Refusal, Start, Text, ToolCall, to_json, usage_json

# ensure_ascii: U+2028 and its kin are line ends to some readers (requests' iter_lines), and a lone
# surrogate has no UTF-8. One line, since both SSE and NDJSON end a record at a line feed.
dumps: Callable[[object], str] = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


class Encoder:
    """What every format says of itself.

    `heartbeat` is written while the model is silent, b"" where the format has no room for it.
    `patient`: the format has nothing to write before its first piece, so the status waits for that piece.
    `in_band`: a failure after the first byte is written; otherwise the connection is broken.
    """

    mimetype: ClassVar[str]
    content_type: ClassVar[str]
    heartbeat: ClassVar[bytes] = b""
    patient: ClassVar[bool] = False
    in_band: ClassVar[bool] = True
    whole: ClassVar[bool] = False  # one body, written when the answer has ended
    headers: ClassVar[dict[str, str]] = {}

    def writes(self, event: Event) -> bool:
        """Whether this event decides the status: its bytes are more than the opening."""
        return not isinstance(event, Start)

    def encode(self, seq: int, event: Event) -> bytes:
        raise NotImplementedError

    def warn(self, code: str, message: str) -> bytes:
        """A word about the log, not of the answer: it has no seq. b"" where the format has no room for it."""
        return b""


class TextEncoder(Encoder):
    """The text and nothing else. A refusal is what the model said, so it is text too. Of several answers, the first."""

    mimetype = "text/plain"
    content_type = "text/plain; charset=utf-8"
    patient = True
    in_band = False

    def writes(self, event: Event) -> bool:
        return isinstance(event, (Text, Refusal, *ENDS))

    def encode(self, seq: int, event: Event) -> bytes:
        return event.text.encode() if isinstance(event, (Text, Refusal)) and not event.choice else b""


class SseEncoder(Encoder):
    """Server-sent events (WHATWG HTML 9.2): id, event, data, blank line."""

    mimetype = "text/event-stream"
    content_type = "text/event-stream; charset=utf-8"
    heartbeat = b": keep-alive\n"

    def encode(self, seq: int, event: Event) -> bytes:
        return f"id: {seq}\nevent: {event.type}\ndata: {dumps(to_json(seq, event))}\n\n".encode("ascii")

    def warn(self, code: str, message: str) -> bytes:
        return f"event: warning\ndata: {dumps(_warning(code, message))}\n\n".encode("ascii")


class NdjsonEncoder(Encoder):
    """One JSON object a line."""

    mimetype = "application/x-ndjson"
    content_type = "application/x-ndjson; charset=utf-8"
    heartbeat = b'{"type":"heartbeat"}\n'

    def encode(self, seq: int, event: Event) -> bytes:
        return dumps(to_json(seq, event)).encode("ascii") + b"\n"

    def warn(self, code: str, message: str) -> bytes:
        return dumps(_warning(code, message)).encode("ascii") + b"\n"


def _warning(code: str, message: str) -> dict[str, str]:
    return {"type": "warning", "code": code, "message": message}


class Gathered:
    """One answer to the question, as far as it has come."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {}
        self.calls: dict[int, ToolCall] = {}
        self.logprobs: dict[str, list[Any]] = {}  # by "content" and "refusal"
        self.finish_reason: str | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, ChoiceEnd):
            self.finish_reason = event.finish_reason
            return
        if isinstance(event, ToolCall):
            self.calls[event.index] = joined(self.calls.get(event.index), event)
        else:
            self.texts.setdefault(event.type, []).append(event.text)  # type: ignore[union-attr]
        for kind, tokens in (event.logprobs or {}).items():  # type: ignore[union-attr]
            self.logprobs.setdefault(kind, []).extend(tokens or ())

    def text(self, kind: str) -> str:
        return "".join(self.texts.get(kind, ()))


class WholeEncoder(Encoder):
    """Gathers an answer, and writes it when it ends; its status is always the true one."""

    mimetype = "application/json"
    content_type = "application/json; charset=utf-8"
    patient = True
    in_band = False
    whole = True

    def __init__(self) -> None:
        self.start: Start | None = None
        self.choices: defaultdict[int, Gathered] = defaultdict(Gathered)

    def writes(self, event: Event) -> bool:
        return isinstance(event, ENDS)

    def encode(self, seq: int, event: Event) -> bytes:
        if isinstance(event, Start):
            self.start = event
        elif isinstance(event, Finish):
            assert self.start is not None, "an answer begins with Start"
            return dumps(self.body(self.start, event)).encode("ascii") + b"\n"
        elif not isinstance(event, Failure):
            self.choices[event.choice].add(event)
        return b""

    def body(self, start: Start, finish: Finish) -> dict[str, object]:
        raise NotImplementedError


def joined(call: ToolCall | None, piece: ToolCall) -> ToolCall:
    """A tool call with one more piece of it."""
    if call is None:
        return piece
    return ToolCall(call.index, call.id or piece.id, call.name or piece.name, call.arguments + piece.arguments)


class JsonEncoder(WholeEncoder):
    """The whole answer as one object of ours."""

    def body(self, start: Start, finish: Finish) -> dict[str, object]:
        return {
            "id": start.id,
            "status": finish.status,
            "model": start.model,
            "created_at": start.created_at,
            "text": self.choices[0].text("text") + self.choices[0].text("refusal"),
            "finish_reason": finish.finish_reason,
            "usage": usage_json(finish.usage),
            "error": None,
        }


# In the order of preference where the caller leaves the choice to us.
ENCODERS: dict[str, type[Encoder]] = {
    encoder.mimetype: encoder for encoder in (TextEncoder, SseEncoder, NdjsonEncoder, JsonEncoder)
}


def choose_encoder(accept: str | None, offered: Mapping[str, type[Encoder]] = ENCODERS) -> type[Encoder]:
    """The format that an Accept header (RFC 9110 12.5.1) likes best; the first one offered for none and for */*.

    Raises NotAcceptable where it names only what we cannot write.
    """
    if not accept or not accept.strip():
        return next(iter(offered.values()))
    # Parameters do not tell our formats apart: "text/event-stream; charset=utf-8" is what we write.
    ranges = [(value.partition(";")[0].strip(), quality) for value, quality in parse_accept_header(accept, MIMEAccept)]
    best = MIMEAccept(ranges).best_match(offered)
    if best is None:
        raise NotAcceptable(f"The header Accept must allow one of: {', '.join(offered)}.")
    return offered[best]
