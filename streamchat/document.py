"""A kept answer becomes the object of `GET /responses/<id>`. Plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .ending import error_of
from .events import ENDS, Event, Failure, Refusal, Text, usage_json
from .store import LIVE, Batch, Kept, unpack


def document(kept: Kept, batches: Sequence[Batch]) -> dict[str, Any]:
    """`text` is what there is so far; null where the log of an ended answer is not complete."""
    events = [event for batch in batches for event in unpack(batch.payload)]
    return {
        "id": kept.id,
        "status": kept.status,
        "model": kept.model,
        "created_at": int(kept.created_at),
        "text": _text(events) if _is_whole(kept, batches, events) else None,
        "finish_reason": kept.finish_reason,
        "usage": usage_json(kept.usage),
        "error": _error(kept, events),
    }


def _is_whole(kept: Kept, batches: Sequence[Batch], events: Sequence[Event]) -> bool:
    follow = [batch.first for batch in batches] == [0, *(batch.last + 1 for batch in batches)][: len(batches)]
    return follow and (kept.status in LIVE or bool(events and isinstance(events[-1], ENDS)))


def _text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, (Text, Refusal)) and not event.choice)


def _error(kept: Kept, events: Sequence[Event]) -> dict[str, Any] | None:
    """As the answer's last event told it."""
    if kept.error is None:
        return None
    last = events[-1] if events else None
    failure = last if isinstance(last, Failure) else Failure(kept.error, "", False)
    told = error_of(Failure(kept.error, failure.message or "", failure.retryable))
    return {"code": kept.error, "message": told.detail, "retryable": told.retryable}
