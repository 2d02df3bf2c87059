"""What stays of an answer: one record, told by a signal and one log line. Never holds what was asked or answered."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields

from blinker import Namespace

logger = logging.getLogger("streamchat")

DIGITS = 3  # of a second: milliseconds
_dumps = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode

signals = Namespace()
answer_started = signals.signal("answer-started")
answer_finished = signals.signal("answer-finished")


@dataclass(frozen=True)
class Record:
    """One admitted answer, whatever became of it. Times are seconds; `started` is a Unix time.

    `outcome` is completed, or the code of the error that ended it; caller_left and caller_stalled among them.
    """

    id: str
    user: str | None
    model: str
    started: float
    first_piece: float | None
    duration: float
    outcome: str
    finish_reason: str | None
    pieces: int
    input_tokens: int
    output_tokens: int
    estimated: bool
    attempts: int
    upstream_status: int | None
    upstream_request_id: str | None
    upstream_code: str | None


FIELDS = tuple(field.name for field in fields(Record))


@dataclass(slots=True)
class Trail:
    """What the upstream's side left, for on-call: filled while the answer goes on. Never the upstream's words."""

    attempts: int = 0
    status: int | None = None
    request_id: str | None = None
    code: str | None = None


def log_record(record: Record) -> None:
    """The one line of an answer: JSON, without what is None. The record itself is `record.answer`, for handlers.

    A user id is the shop's, and may hold anything: escaped, one line stays one line, and one field one field.
    """
    told = {name: value for name in FIELDS if (value := getattr(record, name)) is not None}
    line = {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in told.items()}
    logger.info("answer %s", _dumps(line), extra={"answer": record})
