"""The routes of answers that the log keeps: the object, the stream after an event, the end of one by its user's wish.

Whatever the reason, an answer that is not there for this user is a 404 in the same words.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence

from flask import Response, request, url_for

from .client_encoders import UI_ENCODERS
from .dialects import OWN, UI, Dialect
from .document import document
from .encoders import Encoder, choose_encoder
from .ending import error_of
from .errors import InvalidRequest, StoreDown, StreamChatError
from .events import ENDS, Event, Failure, Finish, Start
from .hangup import Caller
from .mount import Mount
from .replay import SLICE, Replay, give_way, past_the_end
from .responses import ANSWER, HEADERS, in_dialect, streamed
from .store import LIVE, Batch, Kept, unpack

RESUMABLE = {"X-Stream-Resumable": "?1"}  # RFC 9651 4.1.9: a structured field that is true
CANCEL_SECONDS = 1.0  # how long a cancelled answer may take to end, wherever it is made
CANCEL_STEP = 0.05
SEQ_DIGITS = 15


def response(id: str) -> Response:
    """What became of an answer, and its text."""
    return in_dialect(OWN, lambda mount, _, __: _told_whole(mount, mount.find(id, mount.user(request))))


def response_stream(id: str) -> Response:
    """The events after `Last-Event-ID` or ?after=N, then live. 204 where there will be none: an EventSource stops."""

    def view(mount: Mount, _: str, __: Dialect) -> Response:
        encoder = choose_encoder(request.headers.get("Accept"))()
        given = _after()
        kept = mount.find(id, mount.user(request))
        after = _beginning(mount, kept, given)
        return _nothing() if after is None else replayed(mount, kept, after, encoder)

    return in_dialect(OWN, view)


def cancel_response(id: str) -> Response:
    """Stops an answer; the object of what became of it. Idempotent."""

    def view(mount: Mount, _: str, __: Dialect) -> Response:
        user = mount.user(request)
        try:
            kept = mount.find(id, user)
        except StoreDown:
            mount.log.cancel_here(id, user)
            raise
        if kept.status in LIVE:
            mount.cancel(id)
            kept = _ended(mount, kept)
        return _told_whole(mount, kept)

    return in_dialect(OWN, view)


def chat_stream(chat_id: str) -> Response:
    """Where `useChat` looks for an answer that still runs. 204 where there is none, or nobody whose it could be."""

    def view(mount: Mount, _: str, __: Dialect) -> Response:
        encoder = choose_encoder(request.headers.get("Accept"), UI_ENCODERS)()
        kept = mount.latest(mount.user(request), chat_id)
        if kept is None or kept.status not in LIVE:
            return _nothing()
        return replayed(mount, kept, -1, encoder)

    return in_dialect(UI, view)


def replayed(mount: Mount, kept: Kept, after: int, encoder: Encoder, headers: dict[str, str] | None = None) -> Response:
    """The answer from the event after `after` on, as it was and as it goes on; `headers`: of one asked for again.

    That one is told a failure before the first piece by the status, as its first caller was.
    """
    request.environ[HEADERS].update({"X-Response-Id": kept.id} | (headers or {}))  # of a failure, too
    failure = _early_failure(mount, kept) if headers is not None else None
    if failure is not None:
        raise failure
    locale = request.accept_languages.best
    caller = Caller.from_environ(request.environ)
    replay = Replay(
        kept,
        -1 if encoder.whole else after,
        mount.log,
        encoder,
        caller,
        mount.process.live,
        mount.settings,
        lambda error: mount.error_text(error, locale),
    )
    mount.release_before_wait()
    replay.begin()
    request.environ[ANSWER] = replay
    return streamed(replay, encoder, {} if encoder.whole else RESUMABLE)


def _early_failure(mount: Mount, kept: Kept) -> StreamChatError | None:
    events = _events(mount, kept, -1) if kept.error is not None else []
    last = events[-1] if events else None
    early = all(isinstance(event, Start) for event in events[:-1])
    return error_of(last) if early and isinstance(last, Failure) else None


def _events(mount: Mount, kept: Kept, after: int) -> list[Event]:
    return [event for batch in mount.log.store.read(kept.id, after) for event in unpack(batch.payload)]


def _beginning(mount: Mount, kept: Kept, after: int) -> int | None:
    """The seq after which a reader is told more; None where it has it all, and nothing will come.

    Raises InvalidRequest for more events than a whole answer has. Of one that failed its readers may have more than the
    log, what its producer had told and not yet written: they are told its end. The last event that is kept need not be
    the answer's last.
    """
    last = kept.next - 1
    if kept.status in LIVE or after < last:
        return after
    events = _events(mount, kept, last - 1)
    end = events[-1] if events else None
    if after == last:
        return None if isinstance(end, ENDS) else after
    if isinstance(end, Finish):
        raise past_the_end(last)
    return last - 1 if isinstance(end, Failure) else after


def _after() -> int:
    """The seq of the last event that the reader has; the header is newer than what stood in the address."""
    given = request.headers.get("Last-Event-ID") or request.args.get("after") or "-1"
    if given != "-1" and not (given.isdecimal() and given.isascii() and len(given) <= SEQ_DIGITS):
        raise InvalidRequest('"after" and Last-Event-ID must be the "seq" of an event, a whole number from 0.')
    return int(given)


def _nothing() -> Response:
    empty = Response(status=204)
    del empty.headers["Content-Type"]  # of nothing: WSGI forbids it
    return empty


def _ended(mount: Mount, kept: Kept) -> Kept:
    """The answer once it has ended, or as it is when that takes too long."""
    until = time.monotonic() + CANCEL_SECONDS
    while kept.status in LIVE and time.monotonic() < until:
        time.sleep(CANCEL_STEP)
        kept = mount.log.store.find(kept.id) or kept
    return kept


def accepted(mount: Mount, kept: Kept, own_id: str) -> Response:
    """202 for an answer that a worker makes, and where it can be read."""
    is_new = kept.id == own_id
    response = _document(kept, []) if is_new else _told_whole(mount, kept)
    response.status_code = 202
    response.headers["Location"] = url_for(".response", id=kept.id)
    if not is_new:
        response.headers["Idempotency-Replayed"] = "true"
    return response


def _told_whole(mount: Mount, kept: Kept) -> Response:
    request.environ[HEADERS]["X-Response-Id"] = kept.id
    return _document(kept, _unhurried(mount.log.store.read(kept.id, -1)))


def _unhurried(batches: Sequence[Batch]) -> Iterator[Batch]:
    """To unpack a long answer takes as long as many pieces of others."""
    size = 0
    for batch in batches:
        yield batch
        size += len(batch.payload)
        if size > SLICE:
            size = 0
            give_way()


def _document(kept: Kept, batches: Iterable[Batch]) -> Response:
    body = json.dumps(document(kept, batches))
    return Response(body + "\n", content_type="application/json", headers={"Cache-Control": "no-store"})
