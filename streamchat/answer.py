"""One answer, from its slot to its one record: opens the upstream, pulls events inline, writes bytes, cleans up.

No Flask in here: the generator lives on when the view's contexts are gone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .cancellation import Cancellation
from .encoders import Encoder
from .errors import CallerGone, Interrupted, StreamChatError, UpstreamStalled, UpstreamTimeout
from .events import Event, Failure, Finish, Start, Usage
from .hangup import Caller
from .ledger import Record
from .live import Live
from .loop import NEVER, Loop
from .settings import Settings
from .upstream import Prompt, Trail

logger = logging.getLogger("streamchat")

EAGER_PIECES = 3  # the first ones are never held back to be joined with others
NOT_SENT = ("upstream_unreachable", "overloaded")
CHARS_A_TOKEN = 4  # OpenAI's rule of thumb for English; used only where the upstream does not count


class Source(Protocol):
    """Where events come from: upstream.Reply, or its Opening."""

    def read(self, until: float) -> list[Event] | None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Order:
    """What is to be answered, for whom."""

    id: str
    user: str | None
    prompt: Prompt


class Opening:
    """The upstream's reply while it is being opened in a helper, so that waiting for it can end in time."""

    def __init__(self, loop: Loop, open_reply: Callable[[], Source], cancellation: Cancellation) -> None:
        self._open = open_reply
        self._cancellation = cancellation
        self._news = threading.Event()
        self._lock = threading.Lock()
        self._reply: Source | None = None
        self._error: Exception | None = None
        self._closed = False
        cancellation.then(self._news.set)
        loop.spawn(self._run)

    def _run(self) -> None:
        try:
            reply = self._open()
        except Exception as error:
            self._error = error
        else:
            with self._lock:
                self._reply = reply
                if self._closed:
                    reply.close()
        self._news.set()

    def read(self, until: float) -> list[Event] | None:
        if self._reply is None and not self._news.wait(None if until == NEVER else max(0.0, until - time.monotonic())):
            return None
        self._cancellation.check()
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        return self._reply.read(until)

    def close(self) -> None:
        with self._lock:
            if not self._closed and self._reply is not None:
                self._reply.close()
            self._closed = True


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
        self.trail = Trail()
        self.started = time.monotonic()
        self.writing_since = 0.0
        self._created_at = time.time()
        self._settings = settings
        self._encoder = encoder
        self._live = live
        self._loop = loop
        self._told = told
        self._source: Source | None = None
        self._caller_fd = caller.fileno()
        self._released = False
        self._recorded = threading.Lock()  # taken by the one who records, never given back
        self._outcome: str | None = None
        self._finish: Finish | None = None
        self._seq = 0
        self._writes = 0
        self._events = 0
        self._last_read = 0.0
        self._first_piece: float | None = None
        self._output_chars = 0
        self._text: list[str] | None = [] if keep_text else None
        self._total_due = self.started + settings.total_timeout
        self._progress_due = self.started + settings.first_token_timeout

    def begin(self, open_reply: Callable[[Answer], Source]) -> None:
        """Takes a slot, watches the caller, asks the upstream. Raises Draining or Overloaded."""
        self._live.admit(self)
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
        try:
            yield from self._marked(head)
            for piece in pieces:
                yield from self._marked(piece)
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

    def _marked(self, piece: bytes) -> Iterator[bytes]:
        """The time stands while the server is writing, for the sweep to see."""
        self.writing_since = time.monotonic()
        yield piece
        self.writing_since = 0.0

    def _fail(self, error: StreamChatError) -> Iterator[bytes]:
        self._end(error)
        if self._encoder.in_band and not isinstance(error, CallerGone):
            yield from self._marked(self._encode(Failure(error.code, error.detail, error.retryable)))
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
        pending = self._encode(Start(self.order.id, self.order.prompt.model, int(self._created_at)))
        decided, due = False, NEVER if encoder.patient else self.started + settings.status_hold
        while self._finish is None:
            events = self._pull(due)
            if events is None:
                decided = True
                pending += b"" if pending else encoder.heartbeat
            else:
                decided = decided or any(encoder.writes(event) for event in events)
                pending += b"".join([self._encode(event) for event in events])
            if decided and (pending or self._finish is not None):
                yield pending
                pending = b""
                due = time.monotonic() + settings.heartbeat if encoder.heartbeat else NEVER

    def _pull(self, due: float) -> list[Event] | None:
        """The next events; None at the monotonic time `due`. Raises UpstreamTimeout or UpstreamStalled at its limits."""
        assert self._source is not None
        self._rest()
        while True:
            if time.monotonic() >= self._total_due:
                raise UpstreamTimeout
            events = self._source.read(min(due, self._progress_due, self._total_due))
            now = time.monotonic()
            if events:
                self._progress_due = now + self._settings.idle_timeout
                self._first_piece = self._first_piece or now - self.started
                return events
            if now >= self._progress_due:
                raise UpstreamTimeout if self._first_piece is None else UpstreamStalled
            if now >= due:
                return None

    def _rest(self) -> None:
        """Joins what comes within the coalescing time: after the first pieces there is one read in it."""
        if self._writes >= EAGER_PIECES:
            pause = self._last_read + self._settings.coalesce_ms / 1000 - time.monotonic()
            if pause > 0:
                time.sleep(pause)
        self._last_read = time.monotonic()
        self._writes += 1

    def _encode(self, event: Event) -> bytes:
        if isinstance(event, Finish):
            event = self._finish = self._counted(event)
            self._outcome = "completed"
        elif not isinstance(event, (Start, Failure)):
            self._keep(event)
        encoded = self._encoder.encode(self._seq, event)
        self._seq += 1
        return encoded

    def _keep(self, event: Any) -> None:
        text = event.arguments if event.type == "tool_call" else event.text
        self._events += 1
        self._output_chars += len(text)
        if self._text is not None and event.type in ("text", "refusal"):
            self._text.append(text)

    def _counted(self, finish: Finish) -> Finish:
        return finish if finish.usage is not None else replace(finish, usage=self._estimate())

    def _estimate(self) -> Usage:
        asked = sum(_length(message) for message in self.order.prompt.messages) if self._was_taken() else 0
        return Usage(-(-asked // CHARS_A_TOKEN), -(-self._output_chars // CHARS_A_TOKEN), estimated=True)

    def _was_taken(self) -> bool:
        """Whether the upstream may have counted the prompt: not where it said no, or was not reached."""
        trail = self.trail
        return trail.attempts > 0 and trail.status in (None, 200) and self._outcome not in NOT_SENT

    def _end(self, error: StreamChatError) -> None:
        self._outcome = self._outcome or error.code

    def release(self) -> None:
        """Gives back the watch, the upstream's reply and the slot. Idempotent."""
        if self._released:
            return
        self._released = True
        self._live.hangups.unwatch(self._caller_fd)
        if self._source is not None:
            if self._finish is None:
                self.cancellation.cancel(CallerGone())  # an opening that still runs has nobody to open for
            self._source.close()
        self._live.leave(self)

    def close(self, error: StreamChatError | None = None) -> None:
        """The last call: releases, and tells the one record. Idempotent, from any greenlet or thread."""
        self._end(error or self.cancellation.error or Interrupted())
        self.release()
        if self._recorded.acquire(blocking=False):
            self._told(self._record(), "".join(self._text or ()))

    def _record(self) -> Record:
        usage = (self._finish and self._finish.usage) or self._estimate()
        return Record(
            id=self.order.id,
            user=self.order.user,
            model=self.order.prompt.model,
            started=self._created_at,
            first_piece=self._first_piece,
            duration=time.monotonic() - self.started,
            outcome=self._outcome or "interrupted",
            finish_reason=self._finish.finish_reason if self._finish else None,
            pieces=self._events,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            estimated=usage.estimated,
            attempts=self.trail.attempts,
            upstream_status=self.trail.status,
            upstream_request_id=self.trail.request_id,
            upstream_code=self.trail.code,
        )


def _length(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    return len(content) if isinstance(content, str) else 0
