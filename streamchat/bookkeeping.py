"""What every store reckons alike: what of a batch is new, and how an answer ends whose producer died. Does no I/O."""

from __future__ import annotations

from dataclasses import replace

from .errors import Interrupted
from .events import Failure
from .ledger import Record
from .store import Batch, Ending, Limits, pack, unpack

DAY = 86400  # seconds; a budget's day is UTC's, and an Idempotency-Key is kept for as long
CHARS_A_TOKEN = 4  # as where an upstream does not count
PACKED_CHARS = 11  # of an event's payload that are not its text: ["text",""],
LAST_EVENT = Failure(Interrupted.code, Interrupted.text, Interrupted.retryable)


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


def last_batch(id: str, seq: int) -> Batch:
    """The event that tells readers that the producer died."""
    return Batch(id, seq, 1, pack([LAST_EVENT]))


def orphan_ending(
    id: str, user: str | None, model: str, started: float, ended: float, events: int, size: int
) -> Ending:
    """The end of an answer whose producer died after `events` events of `size` bytes.

    Its tokens are estimated from what was kept. What the model read, and what the producer had not yet written down,
    nobody knows any more.
    """
    record = Record(
        id=id,
        user=user,
        model=model,
        started=started,
        first_piece=None,
        duration=max(0.0, ended - started),
        outcome=Interrupted.code,
        finish_reason=None,
        pieces=max(0, events - 1),
        input_tokens=0,
        output_tokens=max(0, size - events * PACKED_CHARS) // CHARS_A_TOKEN,
        estimated=True,
        attempts=1 if events else 0,
        upstream_status=None,
        upstream_request_id=None,
        upstream_code=None,
    )
    return Ending(id, "failed", record, error=Interrupted.code)
