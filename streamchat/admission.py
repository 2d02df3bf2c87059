"""An answer is admitted to the log, or refused: once for an Idempotency-Key, within its user's streams and tokens.

What needs no exact count goes on without the log where the store does not answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

from .answer import Answer
from .errors import BudgetExhausted, InvalidRequest, StoreDown, TooManyStreams
from .log import Log
from .order import Order
from .schema import ChatRequest
from .settings import Settings
from .store import Entry, Limits
from .tally import tokens_of

RETRY_AFTER = 5  # seconds; an answer of the user may have ended by then
DAY = 86_400
KEY_CHARS = 255


class Admission:
    """By one mount's settings; `log` is None where no store is named."""

    def __init__(self, settings: Settings, log: Log | None) -> None:
        self._settings = settings
        self._log = log
        self._limits = Limits(settings.max_streams_per_user, settings.max_streams_in_all, settings.tokens_per_day)

    def admit(self, answer: Answer, asked: ChatRequest, key: str | None) -> str:
        """Takes a slot. The answer's own id, or that of the one that the same key got before.

        Raises Draining, Overloaded, TooManyStreams, BudgetExhausted, IdempotencyMismatch, InvalidRequest; StoreDown
        where a count or a key cannot do without the store.
        """
        log, order = self._log, answer.order
        _check_key(key, log is not None)
        needed = key is not None or (self._settings.tokens_per_day > 0 and order.user is not None)
        if log is None or (log.down and not needed):
            answer.admit()
            return order.id
        answer.admit(is_counted=True)  # by the log: also for one whose key has an answer, which takes no stream
        try:
            return self._admitted(log, answer, asked, key, needed)
        except StoreDown:
            if needed:
                raise
            answer.recount()
            return order.id

    def queue(self, log: Log, order: Order, asked: ChatRequest, key: str | None, request: str) -> str:
        """Keeps an answer for a worker. Its own id, or that of the one that the same key got before.

        Raises TooManyStreams, BudgetExhausted, IdempotencyMismatch, InvalidRequest; StoreDown.
        """
        _check_key(key, is_kept=True)
        entry = replace(self._entry(order, asked, key), status="queued", request=request)
        with _timed_refusals():
            id = log.lease.ask(lambda owner: log.store.admit(replace(entry, owner=owner), self._limits))
            if id != order.id and log.store.find(id) is None:  # as below
                id = log.lease.ask(lambda owner: log.store.admit(replace(entry, owner=owner), self._limits))
        return id

    def _admitted(self, log: Log, answer: Answer, asked: ChatRequest, key: str | None, needed: bool) -> str:
        entry = self._entry(answer.order, asked, key, log.lease.owner or "")
        with _timed_refusals():
            id, sheet = log.admit(entry, self._limits, answer.cancellation, needed)
            if sheet is None and log.store.find(id) is None:  # it was just being retracted, or is forgotten
                id, sheet = log.admit(entry, self._limits, answer.cancellation, needed)
        if sheet is not None:
            answer.keep(sheet, findable=key is not None or (entry.chat is not None and entry.user is not None))
            if not sheet.admitted:
                answer.recount()
        return id

    def _entry(self, order: Order, asked: ChatRequest, key: str | None, owner: str = "") -> Entry:
        """Whose it is to be is the log's to say in the end."""
        entry = Entry(
            order.id,
            owner,
            order.user,
            order.prompt.model,
            order.created_at,
            asked.chat,
            key,
            _fingerprint(asked) if key is not None else None,
            self._reserve(order),
        )
        notice = order.notice
        return entry if notice is None else replace(entry, queue=notice.queue, target=notice.target)

    def _reserve(self, order: Order) -> int:
        """The most that the answer can cost."""
        if not self._settings.tokens_per_day:
            return 0
        params = order.prompt.params
        longest = int(params.get("max_output_tokens", self._settings.max_output_tokens))
        return tokens_of(order.prompt.messages, params.get("tools") or ()) + longest * int(params.get("n") or 1)


@contextlib.contextmanager
def _timed_refusals() -> Iterator[None]:
    """The store knows no time of ours."""
    try:
        yield
    except TooManyStreams:
        raise TooManyStreams(retry_after=RETRY_AFTER) from None
    except BudgetExhausted:
        raise BudgetExhausted(retry_after=DAY - int(time.time()) % DAY) from None


def _check_key(key: str | None, is_kept: bool) -> None:
    """Ignored, a key would promise what nobody keeps: a second request would be a second answer, and paid for."""
    if key is None:
        return
    if not is_kept:
        raise InvalidRequest("The header Idempotency-Key needs a response log: STREAMCHAT_STORE_URL turns it on.")
    if not 0 < len(key) <= KEY_CHARS:
        raise InvalidRequest(f"The header Idempotency-Key must have 1 to {KEY_CHARS} characters.")


def _fingerprint(asked: ChatRequest) -> str:
    """Of what the caller sent, however its JSON was written; what a shop makes of it may differ each time."""
    return hashlib.sha256(json.dumps(asdict(asked), sort_keys=True, default=str).encode()).hexdigest()
