"""Events become the bytes of one format: text/plain, SSE, NDJSON, or one whole JSON object.

An encoder owns what it writes and remembers only what its format needs. It never sees a socket or a store.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import ClassVar

from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from .errors import NotAcceptable
from .events import ENDS, Event, Finish, Refusal, Start, Text, to_json, usage_json

# ensure_ascii: U+2028 and its kin are line ends to some readers (requests' iter_lines), and a lone
# surrogate has no UTF-8. One line, since both SSE and NDJSON end a record at a line feed.
_dumps: Callable[[object], str] = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


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

    def writes(self, event: Event) -> bool:
        """Whether this event decides the status: its bytes are more than the opening."""
        return not isinstance(event, Start)

    def encode(self, seq: int, event: Event) -> bytes:
        raise NotImplementedError


class TextEncoder(Encoder):
    """The text and nothing else. A refusal is what the model said, so it is text too."""

    mimetype = "text/plain"
    content_type = "text/plain; charset=utf-8"
    patient = True
    in_band = False

    def writes(self, event: Event) -> bool:
        return isinstance(event, (Text, Refusal, *ENDS))

    def encode(self, seq: int, event: Event) -> bytes:
        return event.text.encode() if isinstance(event, (Text, Refusal)) else b""


class SseEncoder(Encoder):
    """Server-sent events (WHATWG HTML 9.2): id, event, data, blank line."""

    mimetype = "text/event-stream"
    content_type = "text/event-stream; charset=utf-8"
    heartbeat = b": keep-alive\n"

    def encode(self, seq: int, event: Event) -> bytes:
        return f"id: {seq}\nevent: {event.type}\ndata: {_dumps(to_json(seq, event))}\n\n".encode("ascii")


class NdjsonEncoder(Encoder):
    """One JSON object a line."""

    mimetype = "application/x-ndjson"
    content_type = "application/x-ndjson; charset=utf-8"
    heartbeat = b'{"type":"heartbeat"}\n'

    def encode(self, seq: int, event: Event) -> bytes:
        return _dumps(to_json(seq, event)).encode("ascii") + b"\n"


class JsonEncoder(Encoder):
    """The whole answer as one object, written when the answer ends; its status is always the true one."""

    mimetype = "application/json"
    content_type = "application/json; charset=utf-8"
    patient = True
    in_band = False

    def __init__(self) -> None:
        self._start: Start | None = None
        self._text: list[str] = []

    def writes(self, event: Event) -> bool:
        return isinstance(event, ENDS)

    def encode(self, seq: int, event: Event) -> bytes:
        if isinstance(event, Start):
            self._start = event
        elif isinstance(event, (Text, Refusal)):
            self._text.append(event.text)
        elif isinstance(event, Finish):
            return _dumps(self._whole(event)).encode("ascii") + b"\n"
        return b""

    def _whole(self, finish: Finish) -> dict[str, object]:
        assert self._start is not None, "an answer begins with Start"
        return {
            "id": self._start.id,
            "status": "completed",
            "model": self._start.model,
            "created_at": self._start.created_at,
            "text": "".join(self._text),
            "finish_reason": finish.finish_reason,
            "usage": usage_json(finish.usage),
            "error": None,
        }


# In the order of preference where the caller leaves the choice to us.
ENCODERS: dict[str, type[Encoder]] = {
    encoder.mimetype: encoder for encoder in (TextEncoder, SseEncoder, NdjsonEncoder, JsonEncoder)
}


def choose_encoder(accept: str | None) -> type[Encoder]:
    """The format that an Accept header (RFC 9110 12.5.1) likes best; text/plain for none and for */*.

    Raises NotAcceptable where it names only what we cannot write.
    """
    if not accept or not accept.strip():
        return TextEncoder
    # Parameters do not tell our formats apart: "text/event-stream; charset=utf-8" is what we write.
    ranges = [(value.partition(";")[0].strip(), quality) for value, quality in parse_accept_header(accept, MIMEAccept)]
    best = MIMEAccept(ranges).best_match(ENCODERS)
    if best is None:
        raise NotAcceptable(f"The header Accept must allow one of: {', '.join(ENCODERS)}.")
    return ENCODERS[best]
