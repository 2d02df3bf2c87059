"""The lease of one process in its store: taken, renewed, and what is due beside it. Says whether the store answers.

A lease that is lost never comes back: the next one is a new one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from .errors import LeaseLost, StoreDown
from .loop import Bell, Loop
from .store import Store
from .tail import Tails

logger = logging.getLogger("streamchat")

T = TypeVar("T")

BEATS = 3  # renewals in the time of a lease; what dead processes left is looked for twice as often
ATTEND = 1.0  # seconds between two words about who is read here
ANSWERS_WITHIN = 2.0  # seconds: the contract of stores


class Lease:
    """`owner` is None until somebody asks for it, and while there is none. `lost` is told of one that is lost.

    `begin` is called once, before the first is taken: it starts whatever works beside the answers, `keep` too.
    """

    def __init__(
        self,
        store: Store,
        loop: Loop,
        seconds: float,
        tails: Tails,
        begin: Callable[[], None],
        lost: Callable[[str], None],
    ) -> None:
        self.owner: str | None = None
        self.down = False  # the store did not answer the last time
        self.beat = seconds / BEATS
        self._store = store
        self._loop = loop
        self._tails = tails
        self._begin = begin
        self._lost = lost
        self._begun = False
        self._closed = False
        self._stop, self._stop_writing = loop.bell(), loop.bell()
        self._fell_at = 0.0  # monotonic
        self._lock = threading.Lock()

    def held(self) -> str:
        """The owner; takes a lease where there is none. Raises StoreDown."""
        owner, asked = self.owner, time.monotonic()
        if owner is not None:
            return owner
        if not self._lock.acquire(timeout=ANSWERS_WITHIN):
            raise StoreDown
        try:
            if self.owner is None:
                if self._closed or self._fell_at > asked:  # another one asked meanwhile, for all
                    raise StoreDown
                self.owner = self._taken()
            return self.owner
        finally:
            self._lock.release()

    def _taken(self) -> str:
        if not self._begun:
            self._begun = True
            self._begin()
        try:
            owner = self._store.take_lease()
            self._tails.begin(owner)
        except StoreDown:
            self.fell()
            raise
        self.down = False
        return owner

    def ask(self, question: Callable[[str], T]) -> T:
        """What the store answers the owner. Raises StoreDown, and LeaseLost where one lease after the other is lost."""
        owner = self.held()
        try:
            return self._asked(question, owner)
        except LeaseLost:
            return self._asked(question, self.held())

    def _asked(self, question: Callable[[str], T], owner: str) -> T:
        try:
            return question(owner)
        except StoreDown:
            self.fell()
            raise
        except LeaseLost:
            self.lose(owner)
            raise

    def fell(self) -> None:
        """The store did not answer."""
        self._fell_at = time.monotonic()
        if not self.down:
            self.down = True
            logger.warning("the response log does not answer: answers go on without it")

    def lose(self, owner: str) -> None:
        """The store said that this owner is dead: others have ended its answers."""
        with self._lock:
            if self.owner == owner:
                self.owner = None
        self._lost(owner)

    def keep(self) -> None:
        """Renews, or takes a new lease; tells who is read here; ends what dead processes left. Until `close`.

        The last two write: where the store is locked they wait longer than a short lease lasts.
        """
        ended = threading.Event()

        def write() -> None:
            try:
                self._repeat({self._reap: self.beat / 2, self._attend: ATTEND}, self._stop_writing)
            finally:
                ended.set()

        self._loop.spawn(write)
        self._repeat({self._renew: self.beat}, self._stop)
        ended.wait()

    def _repeat(self, pace: dict[Callable[[str], None], float], stop: Bell) -> None:
        due = dict.fromkeys(pace, 0.0)
        while not self._closed:
            now = time.monotonic()
            for task in due:
                # One that failed is tried again soon. A full store may refuse one and do another.
                if now >= due[task]:
                    due[task] = now + (pace[task] if self._succeeds(task) else min(self.beat / 2, ATTEND))
            stop.wait(min(due.values()))

    def _succeeds(self, task: Callable[[str], None]) -> bool:
        owner = self.owner
        try:
            owner = self.held()
            task(owner)
        except StoreDown:
            self.fell()
            return False
        except LeaseLost:
            if owner is not None:
                self.lose(owner)
            return False
        except Exception:  # a bug in a store: the lease must go on
            logger.exception("the response log failed")
        return True

    def _renew(self, owner: str) -> None:
        self._store.renew(owner)
        self.down = False

    def _reap(self, _: str) -> None:
        self._store.reap()

    def _attend(self, _: str) -> None:
        if ids := self._tails.ids:
            self._store.attend(ids)

    def stop(self) -> None:
        """No lease is taken any more, and `keep` ends."""
        self._closed = True
        self._stop.ring()
        self._stop_writing.ring()

    def give_up(self) -> None:
        owner, self.owner = self.owner, None
        try:
            if owner is not None:
                self._store.give_up(owner)
        except StoreDown:
            logger.warning("the response log does not answer: its lease ends by itself")
