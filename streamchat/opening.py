"""The upstream's reply while it is being opened: in a helper, so that waiting for it can end in time.

Only the opening has a helper. From the reply on, the answer's own greenlet or thread reads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from .cancellation import Cancellation
from .events import Event
from .loop import NEVER, Loop


class Source(Protocol):
    """Where events come from: upstream.Reply, or its Opening.

    `ahead`: the last read brought so much that there may be more to take than one read brings.
    """

    ahead: bool

    def read(self, until: float) -> list[Event] | None: ...

    def close(self) -> None: ...


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
        self.ahead = False
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
        reply = self._reply
        assert reply is not None
        events = reply.read(until)
        self.ahead = reply.ahead
        return events

    def close(self) -> None:
        with self._lock:
            if not self._closed and self._reply is not None:
                self._reply.close()
            self._closed = True
