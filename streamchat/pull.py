"""The next events of an answer, pulled within its time limits; once it flows, one read in the coalescing time."""

from __future__ import annotations

import time

from .errors import UpstreamStalled, UpstreamTimeout
from .events import Event
from .loop import Loop
from .opening import Source
from .settings import Settings
from .tally import Tally

EAGER_PIECES = 3  # the first ones are never held back to be joined with others


class Pull:
    """Reads `source`, which its owner closes."""

    source: Source

    def __init__(self, loop: Loop, settings: Settings, tally: Tally) -> None:
        self._loop = loop
        self._tally = tally
        self._reads = 0  # that brought events
        self._last_read = 0.0
        self._gather = settings.coalesce_ms / 1000
        self._idle = settings.idle_timeout
        self._total_due = tally.started + settings.total_timeout
        self._progress_due = tally.started + settings.first_token_timeout

    def next(self, due: float) -> list[Event] | None:
        """The next events; None at the monotonic time `due`. Raises UpstreamTimeout or UpstreamStalled."""
        self._rest()
        tally = self._tally
        while True:
            if time.monotonic() >= self._total_due:
                raise UpstreamTimeout
            events = self.source.read(min(due, self._progress_due, self._total_due))
            now = time.monotonic()
            if events:
                self._reads += 1
                if self.source.ahead:
                    self._last_read = 0.0
                self._progress_due = now + self._idle
                tally.first_piece = tally.first_piece or now - tally.started
                return events
            if now >= self._progress_due:
                raise UpstreamTimeout if tally.first_piece is None else UpstreamStalled
            if now >= due:
                return None

    def _rest(self) -> None:
        """Joins what comes within the coalescing time: after the first pieces there is one read in it."""
        if self._reads >= EAGER_PIECES:
            until = self._last_read + self._gather
            if until > time.monotonic():
                self._loop.pause(until)
        self._last_read = time.monotonic()
