"""A kept answer, told again from any event on: what the log has, then what is still being made. Asks no model.

Events come once each and in order. What is missing is read again once; then it is an error, never skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from .cancellation import Cancellation
from .encoders import Encoder
from .ending import broken, error_of
from .errors import CallerGone, CallerStalled, Gap, Interrupted, InvalidRequest, StoreDown, StreamChatError
from .events import ENDS, Event, Failure, Finish
from .hangup import Caller
from .live import Live
from .log import Log
from .loop import NEVER
from .settings import Settings
from .store import LIVE, Batch, Kept, unpack
from .tail import Tail

# Bytes of one write. Several fit into the caller's send buffer: one that fills it waits until it is acknowledged, which
# a reader on the same machine (nginx) does 40 ms later. By 64 KiB, 10,000 events took ten times as long.
SLICE = 16_384
MANY = 500  # events that are told before others have their turn
BREATH = 0.0001  # seconds in which others have their turn
LOOK = 5.0  # seconds of silence after which the store is asked whether the answer has ended
FIRST_LOOK = 0.5  # the same, where nothing is kept yet: its admission may be one that is just being retracted

News = list[tuple[int, Event]]


class Replay:
    """One reader of one answer. Owns its tail, the watch on its caller and its slot; `release` gives all back, once."""

    asks = False

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
        # The opening waits for something to tell as long as that of a new answer.
        self._due = NEVER if encoder.patient else self.started + settings.status_hold
        self._look_at = self.started + (LOOK if kept.next else FIRST_LOOK)
        self._words = words
        self._tail: Tail | None = None
        self._finish: int | None = None  # the seq of an end that the reader has, and the log had not yet
        self._trouble = ""  # what is said of the log before a finish that it may not have
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
            pieces = self._told_whole()
            head = next(pieces, b"")
            yield b""
            self.caller.guard()
            yield from self._told(head, pieces)
        finally:
            self.release()

    def _told(self, head: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
        try:
            self.writing_since = time.monotonic()
            yield head
            self.writing_since = 0.0
            head = b""  # a caller that reads nothing would keep it
            for piece in pieces:
                self.writing_since = time.monotonic()
                yield piece
                self.writing_since = 0.0
            self.caller.settle()
            return
        except StreamChatError as error:
            failure = error
        if isinstance(failure, Gap) and self._encoder.in_band:
            yield self._failed(failure)
            self.caller.settle()
        else:  # it is the reader's trouble, not the answer's: a cut is what makes readers come back for the rest
            self.caller.break_off()

    def _told_whole(self) -> Iterator[bytes]:
        """A fault of our own is an end like others."""
        try:
            yield from self._pieces()
        except StreamChatError:
            raise
        except Exception as error:
            raise broken(self.kept.id, error) from None

    def _failed(self, error: StreamChatError) -> bytes:
        """Under the seq that the reader has, to come back for the next."""
        return self._encoder.encode(max(0, self._next - 1), Failure(error.code, self._words(error), error.retryable))

    def _pieces(self) -> Iterator[bytes]:
        """Raises the StreamChatError that the answer ended with where the format cannot say it, or that reading met."""
        pending = b""
        for news in self._news():
            if news is None:
                pending += self._encoder.heartbeat
            for seq, event in news or ():
                if isinstance(event, Failure) and not self._encoder.in_band:
                    yield from (pending[at : at + SLICE] for at in range(0, len(pending), SLICE))
                    raise error_of(event)
                piece = self._encoder.encode(seq, event)
                if self._trouble and isinstance(event, Finish):
                    piece = self._encoder.warn("not_resumable", self._trouble) + piece
                while pending and len(pending) + len(piece) > SLICE:  # an event is cut only where it is longer itself
                    yield pending[:SLICE]
                    pending = pending[SLICE:]
                    give_way()
                pending += piece
            yield from (pending[at : at + SLICE] for at in range(0, len(pending), SLICE))
            pending = b""

    def _news(self) -> Iterator[News | None]:
        """Events in order, up to the last; None where a heartbeat is due. Raises Gap."""
        for told in self._history():  # asked once the tail listens, so that nothing falls between the two
            yield told
            if isinstance(told[-1][1], ENDS):
                return
        if self._next == self._first and self._tail is not None and self.kept.next:
            yield None  # there is nothing new yet: the stream opens all the same
        while True:
            news = self._wait()
            told, beyond = self._in_order(news or [])
            if beyond:
                missing, beyond = self._in_order([*self._read(), *beyond], again=True)
                told += missing
            if self._finish is not None:
                if self._finish < self._next - 1:
                    raise past_the_end(self._finish)
                return
            if told and isinstance(told[-1][1], Finish) and self._tail is not None:
                self._trouble = self._tail.trouble()
            if told or news is None:
                self._due = time.monotonic() + self._heartbeat
                yield told or None
            if told and isinstance(told[-1][1], ENDS):
                return
            if beyond:
                raise Gap

    def _wait(self) -> News | None:
        """What came; None where a heartbeat is due. Raises the cancellation's reason, or Gap."""
        while self._tail is not None:
            if self._tail.is_behind:
                give_way()
            news = self._tail.take(min(self._due, self._look_at))
            self.cancellation.check()
            now = time.monotonic()
            if news:
                self._look_at = now + LOOK
                return news
            if now >= self._look_at:
                self._look_at = now + LOOK
                if self._has_ended():
                    self._leave_tail()  # nobody will tell any more: what there is stands in the log
                    return self._read() or self._last()
            if now >= self._due:
                return None
        raise Gap

    def _has_ended(self) -> bool:
        if self.kept.id in self._log.running:
            return False
        try:
            found = self._log.store.find(self.kept.id)
        except StoreDown:
            return False  # nobody knows; what is new is told once the store is back
        if found is None and not self.kept.next:
            raise StoreDown  # retracted: the same question may be asked again
        return found is None or found.status not in LIVE

    def _history(self) -> Iterator[News]:
        """What the log has, some hundred events at a time. Raises Gap."""
        told: News = []
        for batch in self._log.store.read(self.kept.id, self._next - 1):
            more, beyond = self._in_order(_unpacked(batch), again=True)
            told += more
            if told and (len(told) >= MANY or beyond):
                yield told
                told = []
                give_way()  # many small events are no slice, and take as long
            if beyond:
                raise Gap
        if told:
            yield told

    def _read(self) -> News:
        return [told for batch in self._log.store.read(self.kept.id, self._next - 1) for told in _unpacked(batch)]

    def _last(self) -> News:
        found = self._log.store.find(self.kept.id)
        batches = self._log.store.read(self.kept.id, found.next - 2) if found is not None else []
        return [told for batch in batches for told in _unpacked(batch)][-1:]

    def _in_order(self, news: News, *, again: bool = False) -> tuple[News, News]:
        """Those that follow each other from where the reader stands, up to an end; and those beyond a gap.

        What is looked at `again` has its failure told, whatever stands before it: the answer is not whole anyway.
        """
        told: News = []
        for place, (seq, event) in enumerate(news):
            failed = isinstance(event, Failure)
            if seq < self._next and isinstance(event, Finish):
                self._finish = seq  # its reader was told it before the log had it: that took too long
                break
            if seq > self._next and not (failed and again):
                return told, news[place:]
            if seq == self._next or failed:
                told.append((seq, event))
                self._next = seq + 1
                if isinstance(event, ENDS):
                    break
        return told, []

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


def past_the_end(last: int) -> InvalidRequest:
    """A reader who says to have more events than a whole answer has."""
    return InvalidRequest(f'"after" and Last-Event-ID must be at most {last}, the "seq" of this answer\'s last event.')


def give_way() -> None:
    """A long answer leaves others their turn. gevent polls no socket in a sleep of 0, up to 50 times in a row."""
    time.sleep(BREATH)


def _unpacked(batch: Batch) -> News:
    try:
        return list(enumerate(unpack(batch.payload), batch.first))
    except ValueError:
        raise Gap from None
