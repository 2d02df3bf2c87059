"""One answer, from its slot to its one record: opens the upstream, pulls events inline, writes bytes, cleans up.

No Flask in here: the generator lives on when the view's contexts are gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from .absence import Absence
from .cancellation import Cancellation
from .encoders import Encoder
from .ending import broken, ending_of, failure_of
from .errors import CallerGone, CallerStalled, Interrupted, StreamChatError
from .events import Event, Failure, Finish, Start
from .hangup import Caller
from .ledger import Record
from .live import Live
from .loop import NEVER, Loop
from .opening import Opening, Source
from .order import Order
from .pull import Pull
from .settings import Settings
from .sheet import HOLD, Sheet
from .store import Ending
from .tally import Tally


class Answer:
    """Owns the upstream's reply, the watch on the caller and the slot; `release` gives all back, once.

    An answer that outlives its caller goes on in a helper, which then is the one that closes it.
    """

    asks = True

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
        self.order, self.caller, self.user = order, caller, order.user
        self.cancellation = Cancellation()
        self.tally = Tally(order.prompt.messages, order.prompt.params.get("tools") or (), keep_text=keep_text)
        self.started = self.tally.started
        self.writing_since = 0.0
        self.absence = Absence(settings.on_disconnect, loop, self.cancellation)
        self._sheet: Sheet | None = None
        self._error: StreamChatError | None = None
        self._kept: Record | None = None  # by the log: what is told elsewhere is the same
        self._goes_on = self._released = False
        self._warned = False  # that the answer cannot be resumed; or nobody was told that it could
        self._settings, self._encoder, self._live, self._loop = settings, encoder, live, loop
        self._told = told
        self._source: Source | None = None
        self._caller_fd = caller.fileno()
        self._recorded = threading.Lock()  # taken by the one who records, never given back
        self._seq = 0
        self._pull = Pull(loop, settings, self.tally)

    def admit(self, is_counted: bool = False) -> None:
        """Takes a slot. Raises Draining, Overloaded or TooManyStreams; from then on there is a record."""
        self._live.admit(self, is_counted)

    def recount(self) -> None:
        """Raises TooManyStreams where the log, which should have counted the streams, could not."""
        self._live.recount(self)

    def withdraw(self) -> None:
        """Gives the slot back: there will be no answer, and no record."""
        self._recorded.acquire(blocking=False)
        if self._sheet is not None:
            self._conclude(Interrupted(), 0)
        self.release()

    def keep(self, sheet: Sheet, findable: bool = True) -> None:
        """From now on every event is written to the log. `findable`: by one who knows no id, too."""
        self._sheet, self._warned = sheet, sheet.lost
        self.absence.sheet, self.absence.findable = sheet, findable

    @property
    def resumable(self) -> bool:
        return self.absence.is_survived and self._sheet is not None and not self._sheet.lost

    def tick(self, now: float) -> None:
        """For the sweep."""
        self.absence.tick(now)

    def begin(self, open_reply: Callable[[Answer], Source]) -> None:
        """Watches the caller and asks the upstream."""
        self._live.hangups.watch(self._caller_fd, self.absence.begin)
        self._source = self._pull.source = Opening(self._loop, lambda: open_reply(self), self.cancellation)

    def caller_stalled(self) -> None:
        """For the sweep: the caller has not read for too long."""
        self.absence.begin(CallerStalled())
        self.caller.hang_up()

    def stream(self) -> Iterator[bytes]:
        """The answer's bytes. The first next() returns b"" once the status is decided, and arms the cleanup.

        It raises the StreamChatError of an answer that failed until then; a later failure is written in the format's
        own way. Only GeneratorExit, a kill, and ConnectionResetError for an answer broken off where no socket is shown
        leave it otherwise.
        """
        try:
            yield from self._relay()
        except GeneratorExit:
            if self.absence.is_survived and self.cancellation.error is None and self.tally.outcome is None:
                self._leave_caller()
            else:
                self._end(self.cancellation.error or CallerGone())
            raise
        except self._loop.killed:
            self._end(self.cancellation.error or Interrupted())
            raise
        finally:
            if not self._goes_on:
                self.release()

    def _leave_caller(self) -> None:
        """The caller is gone and the answer is to be finished: somebody else pulls from here on."""
        self._goes_on = True
        self.writing_since = 0.0
        self.absence.begin()
        self._live.hangups.unwatch(self._caller_fd)
        self._loop.spawn(self.go_on)

    def go_on(self) -> None:
        """Makes the rest for those who read it in the log, or all of it. Returns when the answer has ended."""
        try:
            if not self._seq:
                self._noted([self.order.start])
            while self.tally.finish is None:
                if events := self._pull.next(NEVER):
                    self._noted(events)
        except StreamChatError as error:
            self._end(error)
        except BaseException as error:
            self._end(broken(self.order.id, error))
            if isinstance(error, self._loop.killed):
                raise
        finally:
            self._goes_on = False
            self.close()

    def _relay(self) -> Iterator[bytes]:
        pieces = self._pieces()
        head, failure = self._head(pieces)
        if failure is not None:
            self._end(failure)
            raise failure
        yield b""
        self.caller.guard()
        self.absence.findable = True  # the headers, which tell its id, leave with the head
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
            failure = broken(self.order.id, error)
        yield from self._fail(failure)

    def _head(self, pieces: Iterator[bytes]) -> tuple[bytes, StreamChatError | None]:
        """The first bytes, or why there are none: returned, so that it is raised without what lies under it."""
        try:
            return next(pieces), None
        except Exception as error:
            return b"", error if isinstance(error, StreamChatError) else broken(self.order.id, error)

    def _fail(self, error: StreamChatError) -> Iterator[bytes]:
        self._end(error)
        if self._encoder.in_band and not isinstance(error, CallerGone):
            failure = self._conclude(error, HOLD)
            self.writing_since = time.monotonic()
            yield self._encoder.encode(self._seq, failure)
            self.writing_since = 0.0
            self.caller.settle()
        else:
            self.caller.break_off()

    def _pieces(self) -> Iterator[bytes]:
        """What is written, from when the status is decided on. Raises the StreamChatError that ends the answer."""
        encoder, settings = self._encoder, self._settings
        pending = self._written([self.order.start])
        decided, due = False, NEVER if encoder.patient else self.started + settings.status_hold
        while self.tally.finish is None:
            events = self._pull.next(due)
            if events is None:
                decided = True
                pending += b"" if pending else encoder.heartbeat
            else:
                decided = decided or any(encoder.writes(event) for event in events)
                pending += self._written(events)
                events = None
            if decided and (pending or self.tally.finish is not None):
                self.writing_since = time.monotonic()  # for the sweep to see how long the server writes
                yield pending
                self.writing_since, pending = 0.0, b""
                due = time.monotonic() + settings.heartbeat if encoder.heartbeat else NEVER

    def _written(self, events: list[Event]) -> bytes:
        """The events of one read: counted, logged and encoded. A warning of the log stands before the last of them."""
        first, events = self._seq, self._noted(events)
        encode = self._encoder.encode
        pieces = [encode(seq, event) for seq, event in enumerate(events, first)]
        if self._sheet is not None and not self._warned and (trouble := self._sheet.trouble()):
            self._warned = True
            pieces[-1] = self._encoder.warn("not_resumable", trouble) + pieces[-1]
        return b"".join(pieces)

    def _noted(self, events: list[Event]) -> list[Event]:
        """As they are to be told; a Finish, which is the last of all, is logged with the final state."""
        events = [event if isinstance(event, Start) else self.tally.count(event) for event in events]
        self._seq += len(events)
        if self._sheet is not None:
            last = events[-1]
            self._sheet.extend(events[:-1] if isinstance(last, Finish) else events)
            if isinstance(last, Finish):
                self._sheet.end(last, self._ending(last), HOLD)
        return events

    def _end(self, error: StreamChatError) -> None:
        if self.tally.outcome is None:
            self._error = error
        self.tally.end(error.code)

    def _conclude(self, error: StreamChatError, hold: float) -> Failure:
        """Has the failure logged with the final state; waits for that at most `hold` seconds."""
        failure = failure_of(error, self.order.words)
        if self._sheet is not None and self._sheet.ending is None:
            self._sheet.end(failure, self._ending(failure), hold)
        return failure

    def _ending(self, last: Finish | Failure) -> Ending:
        self._kept = self._record()
        return ending_of(self._kept, last, self.order, self.tally.text)

    def _record(self) -> Record:
        return self.tally.record(self.order.id, self.order.user, self.order.prompt.model)

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
        if self._goes_on:
            return
        self._end(error or self.cancellation.error or Interrupted())
        self.release()
        if self._recorded.acquire(blocking=False):
            if self.tally.finish is None:
                self._conclude(self._error or Interrupted(), 0)
            if self.absence.since and not isinstance(self._error, CallerGone):
                self._live.desert()
            self._told(self._kept or self._record(), self.tally.text)
