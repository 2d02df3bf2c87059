"""One answer's part of the log while it is being made: what waits to be written, and who reads along here.

Only the answer's producer appends, only the log's writer takes and confirms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .cancellation import Cancellation
from .errors import StoreDown
from .events import Event, Failure, Finish
from .loop import Loop
from .store import Batch, Ending, joined, packed

FULL = 32_768  # bytes: written at once
MOST = 1 << 20  # bytes that wait; above it the answer is given up
OLDEST = 5.0  # seconds that an event may wait for the store
HOLD = 0.05  # seconds that the end of an answer waits for the log
REMOTE = 2.0  # seconds: other processes say once a second who is read there, busy ones later

Note = Callable[["Sheet", int, bool], None]
Tell = Callable[[int, Event], None]


class Sheet:
    """`lost`: what waited is given up, and the answer cannot be resumed. Its final state still is written.

    `admitted` is False where the store did not say whether it has the answer. `alone` is one without a caller: what the
    log does not have, nobody has. It waits for the store as long as the lease lasts.
    """

    def __init__(
        self,
        id: str,
        owner: str,
        cancellation: Cancellation,
        note: Note,
        unattended: Callable[[str], float],
        loop: Loop,
    ) -> None:
        self.id = id
        self.user: str | None = None  # whose answer it is
        self.owner = owner
        self.cancellation = cancellation
        self.next = 0  # seq
        self.lost = False
        self.admitted = True
        self.alone = False
        self.batch: Batch | None = None  # on its way to the store
        self.ending: Ending | None = None
        self.ends_with_batch = False
        self.over = False
        self.readers: list[Tell] = []
        self._note = note
        self._unattended = unattended
        self._lock = loop.lock()  # threads append and take at once
        self._waiting: list[str] = []  # packed at once: later, its events would have to be fetched from far memory
        self._taken: list[str] = []  # what the batch was made of: readers get it in parts
        self._first = 0  # seq of the first that waits
        self._size = 0
        self._taken_size = 0
        self._since = 0.0  # monotonic: when the oldest of what waits came; 0.0 where nothing does
        self._taken_since = 0.0
        self._end_is_told = False
        self._read_at = 0.0  # monotonic: when the last reader of this process left
        self._written = loop.bell()  # rung once `over`

    @property
    def waits(self) -> bool:
        """Whether there is something that the writer has not taken."""
        return bool(self._waiting) or (self.ending is not None and not self.over)

    @property
    def can_be_read(self) -> bool:
        """Whether anybody reads along, or may still come to."""
        return not self.lost or bool(self.readers)

    def is_late(self, now: float) -> bool:
        """Whether the oldest of what the store does not have has waited too long for it."""
        since = self._taken_since or self._since
        return bool(since) and not self.alone and now - since > OLDEST

    def extend(self, events: Sequence[Event]) -> None:
        """Called with the events of each read, in the order of seq from 0."""
        if events:
            self._tell(self._add(events, None), events)

    def end(self, event: Finish | Failure, ending: Ending, hold: float) -> None:
        """The last event and the final state: written in one transaction, at once.

        Waits for that at most `hold` seconds, and only then tells readers; `trouble` says what became of it.
        """
        seq = self._add((event,), ending)
        if hold:
            self.wait(hold)
        self._end_is_told = True
        self._tell(seq, (event,))

    def retract(self, ending: Ending) -> None:
        """The answer is not made after all."""
        self.ending = ending
        self._note(self, 0, True)

    def wait(self, seconds: float) -> bool:
        """For the final state to be written. False: it is not yet."""
        until = time.monotonic() + seconds
        while not self.over and self._written.wait(until):
            pass
        return self.over

    def _add(self, events: Sequence[Event], ending: Ending | None) -> int:
        change = 0
        with self._lock:
            seq, self.next = self.next, self.next + len(events)
            self.ending = ending or self.ending
            if not self.lost:
                part, now = packed(events), time.monotonic()
                change = len(part)
                self._size += change
                self._waiting.append(part)
                self._since = self._since or now
                if self._size + self._taken_size > MOST or self.is_late(now):
                    change -= self._give_up()
            full = self._size >= FULL or ending is not None
        if change or ending is not None:
            self._note(self, change, full)
        return seq

    def _tell(self, seq: int, events: Sequence[Event]) -> None:
        for tell in tuple(self.readers) if self.readers else ():
            for each, event in enumerate(events, seq):
                tell(each, event)

    def trouble(self) -> str:
        """What the caller is to be told of the log; "" where all is well."""
        if self.ending is not None and not self.over:
            return "The log does not have the end of this answer yet."
        return "This answer can no longer be resumed: the log does not keep up." if self.lost else ""

    def take(self) -> int:
        """Makes a batch of what waits, unless one is on its way; its size."""
        with self._lock:
            if self.batch is None:
                if self._waiting:
                    self.batch = Batch(self.id, self._first, self.next - self._first, joined(self._waiting))
                self._taken, self._waiting, self._first = self._waiting, [], self.next
                self._taken_size, self._size = self._size, 0
                self._taken_since, self._since = self._since, 0.0
                self.ends_with_batch = self.ending is not None
            return self._taken_size

    def confirm(self) -> int:
        """The store has what was taken; its size."""
        with self._lock:
            size, self._taken_size = self._taken_size, 0
            self.batch, self._taken, self._taken_since = None, [], 0.0
            self.over = self.over or self.ends_with_batch
        if self.over:
            self._written.ring()
        return size

    def give_up(self) -> int:
        """Drops what waits; its size."""
        with self._lock:
            return self._give_up()

    def _give_up(self) -> int:
        size = self._size + self._taken_size
        self.lost = True
        self.batch, self._taken, self._waiting = None, [], []
        self._size, self._taken_size, self._since, self._taken_since = 0, 0, 0.0, 0.0
        return size

    def leave(self, tell: Tell) -> None:
        """A reader of this process reads no longer."""
        self.readers.remove(tell)
        self._read_at = time.monotonic()

    def idle(self) -> float:
        """Seconds since anybody read along, in this process or another; infinity where nobody did, or will any more."""
        if self.readers:
            return 0.0
        if not self.can_be_read:
            return float("inf")
        try:
            elsewhere = max(0.0, self._unattended(self.id) - REMOTE)
        except StoreDown:
            return 0.0  # nobody knows
        if self.readers:  # one came while the store was asked
            return 0.0
        here = time.monotonic() - self._read_at if self._read_at else float("inf")
        return min(here, elsewhere)

    def unwritten(self) -> tuple[int, list[str]]:
        """What the store may not have yet: the seq of the first, and all in packed parts; the end only once it may be
        told. To unpack a mebibyte takes a quarter of a second: that is for the reader, who can give way.
        """
        with self._lock:
            parts = self._taken + self._waiting
            if self.ending is not None and not self._end_is_told:
                del parts[-1:]
            return self._first if self.batch is None else self.batch.first, parts
