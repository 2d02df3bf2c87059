"""One answer's part of the log while it is being made: what waits to be written, and who reads along here.

Only the answer's producer appends, only the log's writer takes and confirms.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .cancellation import Cancellation
from .errors import StoreDown
from .events import Event, Failure, Finish
from .store import Batch, Ending, pack

FULL = 32_768  # bytes: written at once
MOST = 1 << 20  # bytes that wait; above it the answer is given up
AN_EVENT = 64  # bytes that an event takes beside its text
HOLD = 0.05  # seconds that the end of an answer waits for the log

Note = Callable[["Sheet", int, bool], None]
Tell = Callable[[int, Event], None]


class Sheet:
    """`lost`: what waited is given up, and the answer cannot be resumed. Its final state still is written."""

    def __init__(
        self, id: str, owner: str, cancellation: Cancellation, note: Note, unattended: Callable[[str], float]
    ) -> None:
        self.id = id
        self.owner = owner
        self.cancellation = cancellation
        self.next = 0  # seq
        self.lost = False
        self.since = 0.0  # monotonic: when the oldest of what waits came; 0.0 where nothing does
        self.batch: Batch | None = None  # on its way to the store
        self.ending: Ending | None = None
        self.ends_with_batch = False
        self.over = False
        self.readers: list[Tell] = []
        self._note = note
        self._unattended = unattended
        self._waiting: list[Event] = []
        self._taken: list[Event] = []
        self._size = 0
        self._taken_size = 0
        self._written = threading.Event()

    @property
    def waits(self) -> bool:
        """Whether there is something that the writer has not taken."""
        return bool(self._waiting) or (self.ending is not None and not self.over)

    def append(self, event: Event) -> None:
        """Called for each event, in the order of seq from 0."""
        seq, self.next = self.next, self.next + 1
        if not self.lost:
            size = AN_EVENT + len(getattr(event, "text", ""))
            self._size += size
            self._waiting.append(event)
            if not self.since:
                self.since = time.monotonic()
            if self._size > MOST:
                size -= self.give_up()
            self._note(self, size, self._size >= FULL)
        for tell in self.readers:
            tell(seq, event)

    def end(self, event: Finish | Failure, ending: Ending) -> None:
        """The last event and the final state: written in one transaction, at once."""
        self.append(event)
        self.ending = ending
        self._note(self, 0, True)

    def is_written(self, hold: float) -> bool:
        """Whether all is, the ending too; waits for it at most `hold` seconds."""
        return self._written.wait(hold) if hold else self._written.is_set()

    def take(self) -> int:
        """Makes a batch of what waits, unless one is on its way; its size."""
        if self.batch is None:
            count = len(self._waiting)
            self._taken, self._taken_size = self._waiting[:count], self._size
            self.ends_with_batch = self.ending is not None
            if count:
                first = self.next - len(self._waiting)
                self.batch = Batch(self.id, first, count, pack(self._taken))
            del self._waiting[:count]
            self._size -= self._taken_size
        return self._taken_size

    def confirm(self) -> int:
        """The store has what was taken; its size."""
        size, self._taken_size = self._taken_size, 0
        self.batch, self._taken = None, []
        self.since = time.monotonic() if self._waiting else 0.0
        if self.ends_with_batch:
            self.over = True
            self._written.set()
        return size

    def give_up(self) -> int:
        """Drops what waits; its size."""
        size = self._size + self._taken_size
        self.lost = True
        self.batch, self._taken, self._size, self._taken_size, self.since = None, [], 0, 0, 0.0
        self._waiting.clear()
        return size

    def idle(self) -> float:
        """Seconds since anybody read along, in this process or another; infinity where nobody ever did."""
        if self.readers:
            return 0.0
        try:
            return self._unattended(self.id)
        except StoreDown:
            return 0.0  # nobody knows

    def unwritten(self) -> list[tuple[int, Event]]:
        """What the store may not have yet, by seq."""
        events = [*self._taken, *self._waiting]
        return list(enumerate(events, self.next - len(events)))
