"""What every store reckons alike: what of a batch is new, how an answer ends that nobody makes. Does no I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .envelopes import enclose
from .errors import Cancelled, Interrupted, StreamChatError
from .events import Failure, Reasoning, Refusal, Text, ToolCall
from .ledger import Record
from .store import Batch, Ending, Limits, Status, pack, unpack

DAY = 86400  # seconds; a budget's day is UTC's, and an Idempotency-Key is kept for as long
CHARS_A_TOKEN = 4  # as where an upstream does not count
# Where in a packed event stands what the model said.
SAID = {kind.type: 1 + kind.__slots__.index("text") for kind in (Text, Reasoning, Refusal)}
SAID[ToolCall.type] = 1 + ToolCall.__slots__.index("arguments")


def midnight(at: float) -> float:
    """When the UTC day of a Unix time began."""
    return at // DAY * DAY


def is_over(limit: int, used: int, more: int) -> bool:
    """Whether a budget has no room for `more` tokens. One that is spent has none for 0 either."""
    return bool(limit) and used + max(more, 1) > limit


def needs_count(limits: Limits, user: str | None) -> tuple[bool, bool, bool]:
    """Which limits hold: streams of the user, of the service, tokens of the user. Without a user only the second."""
    return (
        bool(limits.streams_per_user) and user is not None,
        bool(limits.streams),
        bool(limits.tokens_per_day) and user is not None,
    )


def unseen(batch: Batch, seq: int) -> Batch | None:
    """The batch without its events below `seq`: a repeated write may have joined old events with new ones."""
    if batch.first >= seq:
        return batch
    if batch.last < seq:
        return None
    known = seq - batch.first
    payload = pack(unpack(batch.payload)[known:])
    return replace(batch, first=seq, count=batch.count - known, payload=payload)


def chars_of(payloads: Iterable[bytes]) -> int:
    """How many characters the model said in packed events. What is not whole says nothing."""
    return sum(map(_chars, payloads))


def _chars(payload: bytes) -> int:
    try:
        return sum(len(item[SAID[item[0]]]) for item in json.loads(payload) if item[0] in SAID)
    except (ValueError, TypeError, LookupError):
        return 0


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A live answer that nobody makes any more: `events` of it are kept, which say so many `chars`."""

    id: str
    user: str | None
    model: str
    created_at: float
    events: int = 0
    chars: int = 0
    queue: str = ""
    target: str = ""


def interrupted(answer: Unfinished, now: float) -> tuple[Batch, Ending]:
    """How an answer ends whose producer died. What is written is the same, whoever does so."""
    return _ended(answer, now, Interrupted(), "failed")


def withdrawn(answer: Unfinished, now: float) -> tuple[Batch, Ending]:
    """How an answer ends that was stopped in its queue."""
    return _ended(answer, now, Cancelled(), "cancelled")


def _ended(answer: Unfinished, now: float, error: StreamChatError, status: Status) -> tuple[Batch, Ending]:
    event = Failure(error.code, error.detail, error.retryable)
    ending = Ending(answer.id, status, _record(answer, now, error.code), error=error.code)
    batch = Batch(answer.id, answer.events, 1, pack([event]))
    return batch, enclose(ending, event, answer.queue, answer.target)


def _record(answer: Unfinished, now: float, outcome: str) -> Record:
    """Tokens are estimated from what was kept. What the model read, and what the producer had not yet written down,
    nobody knows any more.
    """
    events = answer.events
    return Record(
        id=answer.id,
        user=answer.user,
        model=answer.model,
        started=answer.created_at,
        first_piece=None,
        duration=max(0.0, now - answer.created_at),
        outcome=outcome,
        finish_reason=None,
        pieces=max(0, events - 1),
        input_tokens=0,
        output_tokens=-(-answer.chars // CHARS_A_TOKEN),
        estimated=outcome == Interrupted.code,
        attempts=1 if events else 0,
        upstream_status=None,
        upstream_request_id=None,
        upstream_code=None,
    )
