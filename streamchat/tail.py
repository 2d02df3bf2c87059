"""What readers of running answers wait for: pieces of answers that this process makes, or that others write.

Events come in the order of seq; what is missing or comes twice is for the reader to see, who knows where it stands.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from .errors import StoreDown
from .events import Event
from .loop import Bell, Loop
from .sheet import Sheet
from .store import Batch, Listener, Store, joined, unpack

logger = logging.getLogger("streamchat")

LISTEN = 0.25  # seconds of one wait for news: what the end of the process waits at most
AGAIN = 0.5  # seconds until the store is listened to again after it failed
SLICE = 8192  # bytes that are unpacked at once: some hundred small events, 2 ms


class Tail:
    """One reader's queue. Its owner closes it, once.

    `trouble`: what readers of a finish are to be told of the log, which may not have it; "" where all is well.
    """

    def __init__(self, bell: Bell, leave: Callable[[Tail], None], trouble: Callable[[], str] = lambda: "") -> None:
        self.bell = bell
        self.trouble = trouble
        self.news: deque[tuple[int, Event]] = deque()
        self._leave = leave
        self._first, self._packed = 0, deque[str]()

    @property
    def is_behind(self) -> bool:
        """Whether there still is something from before its time: until then, each `take` is work."""
        return bool(self._packed)

    def begin(self, first: int, packed: Sequence[str]) -> None:
        """What is from before its time. Some of it may be told as well."""
        self._first, self._packed = first, deque(packed)

    def tell(self, seq: int, event: Event) -> None:
        self.news.append((seq, event))
        self.bell.ring()

    def take(self, until: float) -> list[tuple[int, Event]]:
        """What came since; [] at the monotonic time `until`, or when the bell was rung for another reason."""
        if self._packed:
            return self._unpacked()
        if not self.news:
            self.bell.wait(until)
        return [self.news.popleft() for _ in range(len(self.news))]

    def _unpacked(self) -> list[tuple[int, Event]]:
        parts, size = list[str](), 0
        while self._packed and size < SLICE:
            parts.append(self._packed.popleft())
            size += len(parts[-1])
        told = list(enumerate(unpack(joined(parts)), self._first))
        self._first += len(told)
        return told

    def close(self) -> None:
        self._leave(self)


class Tails:
    """All readers of this process. One greenlet or thread listens to the store for them."""

    def __init__(self, store: Store, loop: Loop, cancelled: Callable[[str], None]) -> None:
        self._store = store
        self._loop = loop
        self._cancelled = cancelled
        self._listener: Listener | None = None
        self._following: dict[str, list[Tail]] = {}
        # Threads come and go at once. The collector may end a reader while it is held: reentrant.
        self._lock = threading.RLock()
        self._closed = False
        self._silent = threading.Event()  # nobody listens any more

    @property
    def ids(self) -> set[str]:
        """The answers of other processes that are read here."""
        return set(self._following)

    def begin(self, owner: str) -> None:
        """Listens under this lease from now on. Raises StoreDown."""
        listener = self._store.listen(owner)
        try:
            with self._lock:
                for id in self._following:
                    listener.add(id)
                old, self._listener = self._listener, listener
        except BaseException:
            listener.close()
            raise
        if old is None:
            self._loop.spawn(self._listen)
        else:
            old.close()

    def of_sheet(self, sheet: Sheet) -> Tail:
        """Of an answer that is made here: from memory."""
        tail = Tail(self._loop.bell(), lambda tail: sheet.leave(tail.tell), sheet.trouble)
        sheet.readers.append(tail.tell)
        tail.begin(*sheet.unwritten())
        return tail

    def of_store(self, id: str) -> Tail:
        """Of an answer that another process makes. Raises StoreDown."""
        tail = Tail(self._loop.bell(), lambda tail: self._drop(id, tail))
        with self._lock:
            tails = self._following.setdefault(id, [])
            tails.append(tail)
            self._following[id] = tails  # once more: the collector may have dropped the last reader in between
            listener = self._listener
        try:
            if listener is not None:
                listener.add(id)
        except BaseException:
            tail.close()
            raise
        return tail

    def _drop(self, id: str, tail: Tail) -> None:
        with self._lock:  # the listener's part too: another reader may come, and must be the last who speaks
            tails = self._following.get(id, [])
            if tail in tails:
                tails.remove(tail)
            if not tails and self._following.pop(id, None) is not None and self._listener is not None:
                self._listener.drop(id)

    def _listen(self) -> None:
        while not self._closed:
            listener = self._listener
            assert listener is not None
            try:
                self._hear(listener)
            except StoreDown:
                self._loop.pause(time.monotonic() + AGAIN)
            except Exception:  # a bug in a store: others still are to hear
                if listener is self._listener and not self._closed:
                    logger.exception("the response log failed")
                    self._loop.pause(time.monotonic() + AGAIN)
        self._silent.set()

    def _hear(self, listener: Listener) -> None:
        batches, cancelled = listener.wait(LISTEN)
        for id in cancelled:
            self._cancelled(id)
        for batch in batches:
            tails = tuple(self._following.get(batch.id, ()))
            events = _events(batch) if tails else []
            for tail in tails:
                tail.news.extend(events)
                tail.bell.ring()

    def close(self, within: float) -> None:
        """Nobody listens from then on, if the store lets go in time."""
        self._closed = True
        if self._listener is not None:
            self._listener.close()
            self._silent.wait(within)


def _events(batch: Batch) -> list[tuple[int, Event]]:
    """None where they are not whole: readers see the gap."""
    try:
        return list(enumerate(unpack(batch.payload), batch.first))
    except ValueError:
        return []
