"""A kept answer, told again from any event on: what the log has, then what is still being made. Asks no model.

Events come once each and in order. What is missing is read again once; then it is an error, never skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from .cancellation import Cancellation
from .encoders import Encoder
from .ending import error_of
from .errors import CallerGone, CallerStalled, Gap, Interrupted, StreamChatError
from .events import ENDS, Event, Failure
from .hangup import Caller
from .live import Live
from .log import Log
from .loop import NEVER
from .settings import Settings
from .store import LIVE, Kept, unpack
from .tail import Tail

SLICE = 65_536  # bytes of one write
MANY = 500  # events that are told before others have their turn
LOOK = 5.0  # seconds of silence after which the store is asked whether the answer has ended

News = list[tuple[int, Event]]


class Replay:
    """One reader of one answer. Owns its tail, the watch on its caller and its slot; `release` gives all back, once."""

    def __init__(
        self,
        kept: Kept,
        after: int,
        log: Log,
        encoder: Encoder,
        caller: Caller,
        live: Live,
        settings: Settings,
        words: Callable[[StreamChatError], str],
    ) -> None:
        self.kept = kept
        self.caller = caller
        self.user: str | None = None  # reading costs no model: it does not count for its user
        self.cancellation = Cancellation()
        self.started = time.monotonic()
        self.writing_since = 0.0
        self._first = self._next = after + 1
        self._log = log
        self._encoder = encoder
        self._live = live
        self._heartbeat = settings.heartbeat if encoder.heartbeat else NEVER
        self._words = words
        self._tail: Tail | None = None
        self._released = False
        self._caller_fd = caller.fileno()

    def begin(self) -> None:
        """Takes a slot and begins to listen. Raises Draining, Overloaded or StoreDown."""
        self._live.admit(self)
        try:
            if self.kept.status in LIVE:
                self._tail = self._log.follow(self.kept.id)
                self.cancellation.then(self._tail.bell.ring)
            self._live.hangups.watch(self._caller_fd, self._caller_left)
        except BaseException:
            self.release()
            raise

    def _caller_left(self) -> None:
        self.cancellation.cancel(CallerGone())

    def caller_stalled(self) -> None:
        self.cancellation.cancel(CallerStalled())
        self.caller.hang_up()

    def tick(self, now: float) -> None:
        """Nothing is due."""

    def stream(self) -> Iterator[bytes]:
        """The bytes. The first next() returns b"" once the status is decided, or raises the StreamChatError."""
        try:
            pieces = self._pieces()
            head = next(pieces, b"")
            yield b""
            self.caller.guard()
            yield from self._told(head, pieces)
        finally:
            self.release()

    def _told(self, head: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
        try:
            yield head
            for piece in pieces:
                self.writing_since = time.monotonic()
                yield piece
                self.writing_since = 0.0
            self.caller.settle()
            return
        except StreamChatError as error:
            failure = error
        if isinstance(failure, CallerGone) or not self._encoder.in_band:
            self.caller.break_off()
        else:
            yield self._failed(failure)
            self.caller.settle()

    def _failed(self, error: StreamChatError) -> bytes:
        return self._encoder.encode(self._next, Failure(error.code, self._words(error), error.retryable))

    def _pieces(self) -> Iterator[bytes]:
        """Raises the StreamChatError that the answer ended with where the format cannot say it, or that reading met."""
        pending = b""
        for news in self._news():
            if news is None:
                pending += self._encoder.heartbeat
            for seq, event in news or ():
                if isinstance(event, Failure) and not self._encoder.in_band:
                    if pending:
                        yield pending
                    raise error_of(event)
                pending += self._encoder.encode(seq, event)
                if len(pending) >= SLICE:
                    yield pending
                    pending = b""
                    time.sleep(0)  # a long answer leaves others their turn
            if pending:
                yield pending
                pending = b""

    def _news(self) -> Iterator[News | None]:
        """Events in order, up to the last; None where a heartbeat is due."""
        ended = False
        for part in self._history():
            yield part
            ended = isinstance(part[-1][1], ENDS)
        if self._next == self._first:
            yield None  # there is nothing new yet: the stream opens all the same
        asked_again = False
        while not ended:
            news: News | None = self._wait()
            if news and news[0][0] > self._next and not asked_again:
                news, asked_again = [*self._read(), *news], True
            elif news:
                asked_again = False
            told = self._in_order(news or [])
            if told or news is None:
                yield told or None
            ended = bool(told) and isinstance(told[-1][1], ENDS)

    def _wait(self) -> News | None:
        """What came; None where a heartbeat is due. Raises the cancellation's reason, or Gap."""
        due = time.monotonic() + self._heartbeat
        while self._tail is not None:
            news = self._tail.take(min(due, time.monotonic() + LOOK))
            self.cancellation.check()
            if news:
                return news
            if time.monotonic() >= due:
                return None
            found = self._log.store.find(self.kept.id)
            if found is None or found.status not in LIVE:
                self._leave_tail()  # nobody will tell any more: what there is stands in the log
                return self._read()
        raise Gap

    def _history(self) -> Iterator[News]:
        """What the log has, in slices. Asked once the tail listens, so that nothing falls between the two."""
        news = self._read()
        for start in range(0, len(news), MANY):
            told = self._in_order(news[start : start + MANY])
            if told:
                yield told

    def _read(self) -> News:
        batches = self._log.store.read(self.kept.id, self._next - 1)
        return [(seq, event) for batch in batches for seq, event in enumerate(unpack(batch.payload), batch.first)]

    def _in_order(self, news: News) -> News:
        """Those that follow each other from where the reader stands; an end is told wherever it stands."""
        told: News = []
        for seq, event in news:
            if seq > self._next and not isinstance(event, Failure):
                raise Gap
            if seq == self._next or (isinstance(event, Failure) and not told):
                told.append((seq, event))
                self._next = seq + 1
        return told

    def release(self) -> None:
        if self._released:
            return
        self._released = True
        self._live.hangups.unwatch(self._caller_fd)
        self._leave_tail()
        self._live.leave(self)

    def _leave_tail(self) -> None:
        if self._tail is not None:
            self._tail.close()
            self._tail = None

    def close(self, error: StreamChatError | None = None) -> None:
        self.cancellation.cancel(error or Interrupted())
        self.release()
