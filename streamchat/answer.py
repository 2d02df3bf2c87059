"""One answer, from its slot to its one record: opens the upstream, pulls events inline, writes bytes, cleans up.

No Flask in here: the generator lives on when the view's contexts are gone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .cancellation import Cancellation
from .encoders import Encoder
from .errors import CallerGone, Interrupted, StreamChatError, UpstreamStalled, UpstreamTimeout
from .events import Event, Failure, Start
from .hangup import Caller
from .ledger import Record
from .live import Live
from .loop import NEVER, Loop
from .opening import Opening, Source
from .prompt import Prompt
from .settings import Settings
from .tally import Tally

logger = logging.getLogger("streamchat")

MANY_EVENTS = 16  # in one read: the upstream is ahead, and there is more to take than one read brings
EAGER_PIECES = 3  # the first ones are never held back to be joined with others


def detail_of(error: StreamChatError) -> str:
    """Our own words for a failure."""
    return error.detail


@dataclass(frozen=True)
class Order:
    """What is to be answered, for whom."""

    id: str
    user: str | None
    prompt: Prompt
    words: Callable[[StreamChatError], str] = detail_of  # what the caller is told of a failure


class Answer:
    """Owns the upstream's reply, the watch on the caller and the slot; `release` gives all back, once."""

    def __init__(
        self,
        order: Order,
        settings: Settings,
        encoder: Encoder,
        caller: Caller,
        live: Live,
        loop: Loop,
        told: Callable[[Record, str], None],
        keep_text: bool = False,
    ) -> None:
        self.order = order
        self.caller = caller
        self.cancellation = Cancellation()
        self.tally = Tally(order.prompt.messages, keep_text=keep_text)
        self.started = self.tally.started
        self.writing_since = 0.0
        self._settings = settings
        self._encoder = encoder
        self._live = live
        self._loop = loop
        self._told = told
        self._source: Source | None = None
        self._caller_fd = caller.fileno()
        self._released = False
        self._recorded = threading.Lock()  # taken by the one who records, never given back
        self._seq = 0
        self._reads = 0  # that brought events
        self._last_read = 0.0
        self._total_due = self.started + settings.total_timeout
        self._progress_due = self.started + settings.first_token_timeout

    def admit(self) -> None:
        """Takes a slot. Raises Draining or Overloaded; from then on there is a record, whatever happens."""
        self._live.admit(self)

    def begin(self, open_reply: Callable[[Answer], Source]) -> None:
        """Watches the caller and asks the upstream."""
        self._live.hangups.watch(self._caller_fd, self._caller_left)
        self._source = Opening(self._loop, lambda: open_reply(self), self.cancellation)

    def _caller_left(self) -> None:
        self.cancellation.cancel(CallerGone())

    def stream(self) -> Iterator[bytes]:
        """The answer's bytes. The first next() returns b"" once the status is decided, and arms the cleanup.

        It raises the StreamChatError of an answer that failed until then; a later failure is written in the format's
        own way. Only GeneratorExit, a kill, and ConnectionResetError for an answer broken off leave it otherwise.
        """
        try:
            yield from self._relay()
        except GeneratorExit:
            self._end(self.cancellation.error or CallerGone())
            raise
        except self._loop.killed:
            self._end(self.cancellation.error or Interrupted())
            raise
        finally:
            self.release()

    def _relay(self) -> Iterator[bytes]:
        pieces = self._pieces()
        head, failure = self._head(pieces)
        if failure is not None:
            self._end(failure)
            raise failure
        yield b""
        self.caller.guard()
        try:
            yield head
            head = b""  # a caller that reads nothing would keep it
            yield from pieces
            self.caller.settle()
            return
        except StreamChatError as error:
            failure = error
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # gevent.Timeout too: gunicorn would write a 500 into the answer
            if isinstance(error, self._loop.killed):
                raise
            failure = self._broken(error)
        yield from self._fail(failure)

    def _head(self, pieces: Iterator[bytes]) -> tuple[bytes, StreamChatError | None]:
        """The first bytes, or why there are none: returned, so that it is raised without what lies under it."""
        try:
            return next(pieces), None
        except StreamChatError as error:
            return b"", error
        except Exception as error:
            return b"", self._broken(error)

    def _fail(self, error: StreamChatError) -> Iterator[bytes]:
        self._end(error)
        if self._encoder.in_band and not isinstance(error, CallerGone):
            failure = Failure(error.code, self.order.words(error), error.retryable)
            self.writing_since = time.monotonic()
            yield self._encode(failure)
            self.writing_since = 0.0
            self.caller.settle()
        else:
            self.caller.break_off()

    def _broken(self, error: BaseException) -> StreamChatError:
        """A fault of our own. Its words stay out of the log: they may be the upstream's."""
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame is not None else "unknown"
        logger.error("answer %s broke: %s at %s", self.order.id, type(error).__name__, place)
        return Interrupted()

    def _pieces(self) -> Iterator[bytes]:
        """What is written, from when the status is decided on. Raises the StreamChatError that ends the answer."""
        encoder, settings = self._encoder, self._settings
        pending = self._encode(Start(self.order.id, self.order.prompt.model, int(self.tally.created_at)))
        decided, due = False, NEVER if encoder.patient else self.started + settings.status_hold
        while self.tally.finish is None:
            events = self._pull(due)
            if events is None:
                decided = True
                pending += b"" if pending else encoder.heartbeat
            else:
                decided = decided or any(encoder.writes(event) for event in events)
                pending += b"".join([self._encode(event) for event in events])
                events = None
            if decided and (pending or self.tally.finish is not None):
                self.writing_since = time.monotonic()  # for the sweep to see how long the server writes
                yield pending
                self.writing_since, pending = 0.0, b""
                due = time.monotonic() + settings.heartbeat if encoder.heartbeat else NEVER

    def _pull(self, due: float) -> list[Event] | None:
        """The next events; None at the monotonic time `due`. Raises UpstreamTimeout or UpstreamStalled."""
        assert self._source is not None
        self._rest()
        while True:
            if time.monotonic() >= self._total_due:
                raise UpstreamTimeout
            events = self._source.read(min(due, self._progress_due, self._total_due))
            now = time.monotonic()
            if events:
                self._reads += 1
                if len(events) >= MANY_EVENTS:
                    self._last_read = 0.0
                self._progress_due = now + self._settings.idle_timeout
                self.tally.first_piece = self.tally.first_piece or now - self.started
                return events
            if now >= self._progress_due:
                raise UpstreamTimeout if self.tally.first_piece is None else UpstreamStalled
            if now >= due:
                return None

    def _rest(self) -> None:
        """Joins what comes within the coalescing time: after the first pieces there is one read in it."""
        if self._reads >= EAGER_PIECES:
            until = self._last_read + self._settings.coalesce_ms / 1000
            if until > time.monotonic():
                self._loop.pause(until)
        self._last_read = time.monotonic()

    def _encode(self, event: Event) -> bytes:
        if not isinstance(event, (Start, Failure)):
            event = self.tally.count(event)
        encoded = self._encoder.encode(self._seq, event)
        self._seq += 1
        return encoded

    def _end(self, error: StreamChatError) -> None:
        self.tally.end(error.code)

    def release(self) -> None:
        """Gives back the watch, the upstream's reply and the slot. Idempotent."""
        if self._released:
            return
        self._released = True
        self._live.hangups.unwatch(self._caller_fd)
        if self._source is not None:
            if self.tally.finish is None:
                self.cancellation.cancel(Interrupted())  # an opening that still runs has nobody to open for
            self._source.close()
        self._live.leave(self)

    def close(self, error: StreamChatError | None = None) -> None:
        """The last call: releases, and tells the one record. Idempotent, from any greenlet or thread."""
        self._end(error or self.cancellation.error or Interrupted())
        self.release()
        if self._recorded.acquire(blocking=False):
            order = self.order
            self._told(self.tally.record(order.id, order.user, order.prompt.model), self.tally.text)
