"""How an answer ended becomes its final state in the log, and the last event that its readers get."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .envelopes import enclose
from .errors import CallerGone, Cancelled, Interrupted, StreamChatError
from .events import Failure, Finish
from .ledger import Record
from .order import Order
from .store import Ending, Status

logger = logging.getLogger("streamchat")

# Everything else that is no finish is a failure.
CANCELLED = ("cancelled", "caller_left", "caller_stalled")


def failure_of(error: StreamChatError, words: Callable[[StreamChatError], str]) -> Failure:
    """The event for callers and readers; that somebody left is nobody else's business."""
    told = Cancelled() if isinstance(error, CallerGone) else error
    return Failure(told.code, words(told), told.retryable)


def _kinds(base: type[StreamChatError]) -> dict[str, type[StreamChatError]]:
    """By code; the deeper class says more of what two share: UpstreamFailure is no retryable one, UpstreamError is."""
    kinds = {kind.code: kind for kind in base.__subclasses__()}
    return kinds | {code: deeper for kind in base.__subclasses__() for code, deeper in _kinds(kind).items()}


KINDS = _kinds(StreamChatError)
# Seconds, by the code of a failure that passes by itself: events do not carry what the first caller was told.
RETRY_AFTER = dict.fromkeys(("overloaded", "draining", "upstream_rate_limited"), 5)


def error_of(failure: Failure) -> StreamChatError:
    """The error that a logged failure was, in the words that it had."""
    return KINDS.get(failure.code, Interrupted)(failure.message, retry_after=RETRY_AFTER.get(failure.code))


def ending_of(record: Record, event: Finish | Failure, order: Order | None = None, text: str = "") -> Ending:
    """With the letter that tells it, where the order wants one."""
    ending, notice = _state_of(record, event), order.notice if order is not None else None
    if order is None or notice is None:
        return ending
    told = text if notice.with_text else None
    return enclose(ending, event, notice.queue, notice.target, told, order.created_at)


def _state_of(record: Record, event: Finish | Failure) -> Ending:
    if isinstance(event, Finish):
        return Ending(record.id, event.status, record, event.finish_reason, event.usage)
    state: Status = "cancelled" if record.outcome in CANCELLED else "failed"
    return Ending(record.id, state, record, error=event.code)


def broken(id: str, error: BaseException) -> StreamChatError:
    """A fault of our own. Its words stay out of the log: they may be the upstream's."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame is not None else "unknown"
    logger.error("answer %s broke: %s at %s", id, type(error).__name__, place)
    return Interrupted()
