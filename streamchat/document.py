"""A kept answer becomes the object of `GET /responses/<id>`. Plain values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .ending import error_of
from .events import ENDS, Event, Failure, Refusal, Text, usage_json
from .store import LIVE, Batch, Kept, unpack


def document(kept: Kept, batches: Iterable[Batch]) -> dict[str, Any]:
    """`text` is what there is so far; null where the log of an ended answer is not complete."""
    events = _events(batches)
    is_whole = kept.status in LIVE or bool(events and isinstance(events[-1], ENDS))
    return {
        "id": kept.id,
        "status": kept.status,
        "model": kept.model,
        "created_at": int(kept.created_at),
        "text": _text(events) if events is not None and is_whole else None,
        "finish_reason": kept.finish_reason,
        "usage": usage_json(kept.usage),
        "error": _error(kept, events),
    }


def _events(batches: Iterable[Batch]) -> list[Event] | None:
    """From the first on; None where some are missing, or are not whole."""
    events: list[Event] = []
    for batch in batches:
        if batch.first != len(events):
            return None
        try:
            events += unpack(batch.payload)
        except ValueError:
            return None
    return events


def _text(events: Sequence[Event]) -> str:
    """What is told as text/plain: of several answers to one question the first."""
    return "".join(event.text for event in events if isinstance(event, (Text, Refusal)) and not event.choice)


def _error(kept: Kept, events: Sequence[Event] | None) -> dict[str, Any] | None:
    """As the answer's last event told it; in our own words where that is not kept."""
    if kept.error is None:
        return None
    last = events[-1] if events else None
    if not isinstance(last, Failure):
        told = error_of(Failure(kept.error, "", False))
        last = Failure(kept.error, told.detail, told.retryable)
    return {"code": kept.error, "message": last.message, "retryable": last.retryable}
