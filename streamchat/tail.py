"""What readers of running answers wait for: pieces of answers that this process makes, or that others write.

Events come in the order of seq; what is missing or comes twice is for the reader to see, who knows where it stands.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from .errors import StoreDown
from .events import Event
from .loop import Bell, Loop
from .sheet import Sheet
from .store import Batch, Listener, Store, unpack

logger = logging.getLogger("streamchat")

LISTEN = 1.0  # seconds of one wait for news
AGAIN = 0.5  # seconds until the store is listened to again after it failed


class Tail:
    """One reader's queue. Its owner closes it, once."""

    def __init__(self, bell: Bell, leave: Callable[[Tail], None]) -> None:
        self.bell = bell
        self.news: deque[tuple[int, Event]] = deque()
        self._leave = leave

    def tell(self, seq: int, event: Event) -> None:
        self.news.append((seq, event))
        self.bell.ring()

    def take(self, until: float) -> list[tuple[int, Event]]:
        """What came since; [] at the monotonic time `until`, or when the bell was rung for another reason."""
        if not self.news:
            self.bell.wait(until)
        return [self.news.popleft() for _ in range(len(self.news))]

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
        self._closed = False

    def begin(self, owner: str) -> None:
        """Listens under this lease from now on. Raises StoreDown."""
        old, self._listener = self._listener, self._store.listen(owner)
        for id in self._following:
            self._listener.add(id)
        if old is None:
            self._loop.spawn(self._listen)
        else:
            old.close()

    def of_sheet(self, sheet: Sheet) -> Tail:
        """Of an answer that is made here: from memory."""
        tail = Tail(self._loop.bell(), lambda tail: sheet.readers.remove(tail.tell))
        sheet.readers.append(tail.tell)
        tail.news.extendleft(reversed(sheet.unwritten()))
        return tail

    def of_store(self, id: str) -> Tail:
        tail = Tail(self._loop.bell(), lambda tail: self._drop(id, tail))
        self._following.setdefault(id, []).append(tail)
        if self._listener is not None:
            self._listener.add(id)
        return tail

    def _drop(self, id: str, tail: Tail) -> None:
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
                batches, cancelled = listener.wait(LISTEN)
            except StoreDown:
                self._loop.pause(time.monotonic() + AGAIN)
            except Exception:  # a bug in a store: others still are to hear
                if not self._closed:
                    logger.exception("the response log failed")
                    self._loop.pause(time.monotonic() + AGAIN)
            else:
                self._tell(batches)
                for id in cancelled:
                    self._cancelled(id)

    def _tell(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            tails = self._following.get(batch.id)
            events = unpack(batch.payload) if tails else ()
            for tail in tails or ():
                tail.news.extend(enumerate(events, batch.first))
                tail.bell.ring()

    def close(self) -> None:
        self._closed = True
        if self._listener is not None:
            self._listener.close()
